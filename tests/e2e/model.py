"""A small model server for tests: slow to start, slow to answer, or streaming, as it is told.

usage: model.py PORT [--import SECONDS] [--health PATH] [--sick FILE] [--asked FILE]

It listens only once it has "imported" its model. `GET PATH` (default /health) is answered 200, every other
GET 404, and `GET /live` 500 while the file `--sick` names this process. The path of every GET is appended to the
file `--asked`. `POST /score/wait?seconds=S` answers after S seconds; `POST /score/stream?events=N` sends N
server-sent events and then nothing more, without ending the stream.
"""

import argparse
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

arguments = argparse.ArgumentParser()
arguments.add_argument("port", type=int)
arguments.add_argument("--import", dest="seconds", type=float, default=0)
arguments.add_argument("--health", default="/health")
arguments.add_argument("--sick")
arguments.add_argument("--asked")
arguments = arguments.parse_args()


def is_sick():
    try:
        with open(arguments.sick) as sick:
            return str(os.getpid()) in sick.read().split()
    except OSError:
        return False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        if arguments.asked:
            with open(arguments.asked, "a") as asked:
                asked.write(self.path + "\n")
        if self.path == "/live":
            self.answer(500 if is_sick() else 200)
        else:
            self.answer(200 if self.path == arguments.health else 404)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        target = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(target.query).items()}
        if target.path == "/score/wait":
            time.sleep(float(query["seconds"]))
            self.answer(200)
        elif target.path == "/score/stream":
            self.stream(int(query["events"]))
        else:
            self.answer(200)

    def stream(self, events):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(events):
            event = f"data: {number}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.flush()
        # Until the client has left.
        self.rfile.read(1)

    def log_message(self, *_):
        pass


time.sleep(arguments.seconds)
ThreadingHTTPServer((os.environ.get("PENSTOCK_HOST", "127.0.0.1"), arguments.port), Handler).serve_forever()
