"""A model behind BentoML, as its manual writes one."""

import os
import time

import bentoml


@bentoml.service
class Model:
    @bentoml.api
    def predict(self, values: list[float], seconds: float = 0) -> dict:
        time.sleep(seconds)
        return {"pid": os.getpid(), "revision": os.environ.get("REVISION"), "sum": sum(values)}
