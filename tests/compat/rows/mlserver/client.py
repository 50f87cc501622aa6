"""Triton's client. MLServer has no binary tensors (its metadata lists no extensions), so they go as JSON."""

import sys

import numpy
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

base, key = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}"}
client = triton.InferenceServerClient(base.removeprefix("http://"), network_timeout=60, connection_timeout=60)
assert client.is_server_live(headers) and client.is_server_ready(headers), "not live or not ready"
assert client.is_model_ready("sum", headers=headers), "the model is not ready"
assert client.get_server_metadata(headers)["extensions"] == []

values = numpy.arange(100, dtype=numpy.float32)
tensor = triton.InferInput("values", list(values.shape), "FP32")
tensor.set_data_from_numpy(values, binary_data=False)
wanted = triton.InferRequestedOutput("sum", binary_data=False)
result = client.infer("sum", [tensor], outputs=[wanted], headers=headers)
assert result.as_numpy("sum").ravel()[0] == values.sum(), result.get_response()

try:
    client.infer("unknown", [tensor], headers=headers)
    raise AssertionError("a model that is not there answered")
except InferenceServerException as error:
    assert "unknown" in error.message(), error.message()
client.close()
