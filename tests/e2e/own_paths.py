"""A model server with paths of its own, as those of MLflow and of OpenAI's API; it knows nothing of /score.

usage: own_paths.py PORT [PORT ...]

It listens on all ports and answers on the first.

`GET /ping` and `GET /v1/models`, `POST /invocations` and `POST /v1/completions` are answered with the method and
the path that were asked for; anything else is 404.
"""

import json
import os
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATHS = {"GET": ["/ping", "/v1/models"], "POST": ["/invocations", "/v1/completions"]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_known = self.path.partition("?")[0] in PATHS[self.command]
        body = json.dumps({"asked": f"{self.command} {self.path}"}).encode()
        self.send_response(200 if is_known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


host = os.environ.get("PENSTOCK_HOST", "127.0.0.1")
further = [socket.create_server((host, int(port))) for port in sys.argv[2:]]
ThreadingHTTPServer((host, int(sys.argv[1])), Handler).serve_forever()
