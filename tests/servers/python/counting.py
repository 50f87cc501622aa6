"""A model server that counts requests and connections, for tests of idle connections.

    python counting.py http.server PORT KEEP_ALIVE_SECONDS
    python counting.py uvicorn PORT KEEP_ALIVE_SECONDS

POST / with an `x-request-number` header is counted; GET /counts answers {"requests": N, "distinct": M}.
"""

import json
import socketserver
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COUNTS = Counter()


def counts():
    return json.dumps({"requests": sum(COUNTS.values()), "distinct": len(COUNTS)}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(counts())

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        COUNTS[self.headers["x-request-number"]] += 1
        self.answer(b"ok")

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 4096
    # Looking up the host name takes seconds on some machines.
    server_bind = socketserver.TCPServer.server_bind


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    body = b"ok"
    if scope["method"] == "GET":
        body = counts()
    else:
        COUNTS[dict(scope["headers"])[b"x-request-number"]] += 1
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main():
    server, port, keep_alive = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if server == "uvicorn":
        import uvicorn

        uvicorn.run(application, port=port, timeout_keep_alive=keep_alive, log_level="warning", backlog=4096)
    else:
        # The time-out of a read is http.server's keep-alive.
        Handler.timeout = keep_alive
        Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
