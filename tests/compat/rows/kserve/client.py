"""Triton's client, with binary tensors in both directions."""

import sys

import numpy
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

base, key = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}"}
client = triton.InferenceServerClient(base.removeprefix("http://"), network_timeout=60, connection_timeout=60)
assert client.is_server_live(headers) and client.is_server_ready(headers), "not live or not ready"
assert client.is_model_ready("sum", headers=headers), "the model is not ready"
assert client.get_model_metadata("sum", headers=headers)["name"] == "sum"

values = numpy.arange(10000, dtype=numpy.float32)
tensor = triton.InferInput("values", list(values.shape), "FP32")
tensor.set_data_from_numpy(values, binary_data=True)
wanted = triton.InferRequestedOutput("sum", binary_data=True)
result = client.infer("sum", [tensor], outputs=[wanted], headers=headers)
assert result.as_numpy("sum").ravel()[0] == values.sum(), result.get_response()
described = result.get_output("sum")
assert "binary_data_size" in described["parameters"], f"the answer was not binary: {described}"

try:
    client.infer("unknown", [tensor], headers=headers)
    raise AssertionError("a model that is not there answered")
except InferenceServerException as error:
    assert "unknown" in error.message(), error.message()
client.close()
