"""A model behind TorchServe, as its manual writes a custom handler."""

import os
import time


class Sum:
    def initialize(self, context):
        pass

    def handle(self, requests, context):
        answers = []
        for request in requests:
            body = request["body"]
            time.sleep(body.get("seconds", 0))
            total = sum(body["values"])
            answers.append({"pid": os.getpid(), "revision": os.environ.get("REVISION"), "sum": total})
        return answers
