"""An Azure scoring script."""

import json
import os
import time


def init():
    pass


def run(raw_data):
    request = json.loads(raw_data)
    time.sleep(request.get("seconds", 0))
    return {"pid": os.getpid(), "revision": os.environ.get("REVISION"), "sum": sum(request["values"])}
