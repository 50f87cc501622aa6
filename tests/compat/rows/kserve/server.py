"""A model behind KServe's model server, as its manual writes a custom one."""

import asyncio
import os

import numpy
from kserve import InferOutput, InferResponse, Model, ModelServer


class Sum(Model):
    def load(self):
        self.ready = True
        return self.ready

    async def predict(self, payload, headers=None, response_headers=None):
        inputs = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        if "seconds" in inputs:
            await asyncio.sleep(float(inputs["seconds"].ravel()[0]))
        values = {
            "sum": numpy.array([inputs["values"].sum()], dtype=numpy.float32),
            "pid": numpy.array([os.getpid()], dtype=numpy.int64),
            "revision": numpy.array([int(os.environ.get("REVISION", "0"))], dtype=numpy.int64),
        }
        outputs = []
        for name, value in values.items():
            output = InferOutput(name, list(value.shape), "FP32" if value.dtype == numpy.float32 else "INT64")
            output.set_data_from_numpy(value, binary_data=False)
            outputs.append(output)
        return InferResponse(
            payload.id or "none",
            self.name,
            outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


if __name__ == "__main__":
    model = Sum("sum")
    model.load()
    ModelServer().start([model])
