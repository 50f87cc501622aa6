"""A model behind MLServer, as its manual writes a custom runtime."""

import asyncio
import os

import numpy
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Sum(MLModel):
    async def load(self) -> bool:
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        if "seconds" in inputs:
            await asyncio.sleep(float(inputs["seconds"].ravel()[0]))
        outputs = {
            "sum": numpy.array([inputs["values"].sum()], dtype=numpy.float32),
            "pid": numpy.array([os.getpid()], dtype=numpy.int64),
            "revision": numpy.array([int(os.environ.get("REVISION", "0"))], dtype=numpy.int64),
        }
        return InferenceResponse(
            model_name=self.name,
            outputs=[NumpyCodec.encode_output(name, value) for name, value in outputs.items()],
        )
