"""A model behind FastAPI, at the path that Penstock expects of a server without routes."""

import os
import time

from fastapi import FastAPI

app = FastAPI()


@app.get("/")
def ready():
    return {}


@app.post("/score")
def score(request: dict):
    time.sleep(request.get("seconds", 0))
    return {"pid": os.getpid(), "revision": os.environ.get("REVISION"), "sum": sum(request["values"])}
