"""A model behind plain WSGI, with a path of its own."""

import json
import os
import time


def app(environ, start_response):
    if environ["PATH_INFO"] != "/predict":
        start_response("200 OK" if environ["PATH_INFO"] == "/" else "404 Not Found", [("Content-Length", "0")])
        return [b""]
    request = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    time.sleep(request.get("seconds", 0))
    answer = {"pid": os.getpid(), "revision": os.environ.get("REVISION"), "sum": sum(request["values"])}
    body = json.dumps(answer).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
