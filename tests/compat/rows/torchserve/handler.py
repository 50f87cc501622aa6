"""A model behind TorchServe, as its manual writes a handler."""

import os
import time


def handle(requests, context):
    # TorchServe calls it once with nothing, so that it can load what it needs.
    answers = []
    for request in requests or []:
        body = request["body"]
        time.sleep(body.get("seconds", 0))
        answers.append({"pid": os.getpid(), "revision": os.environ.get("REVISION"), "sum": sum(body["values"])})
    return answers
