#!/usr/bin/env bash
# Hypercorn 0.18.0: if an application responds without reading a large request body, the connection is closed
# without notice (no `connection: close` in the response). uvicorn 0.54.0 drains the body and keeps the connection open.
#
# Why it matters: a proxy that reuses the connection for its next request races the close; a POST that loses the race
# gets no response and cannot be retried. RFC 9112, section 9.6, says that a server should send the option before it closes.
# Observed on 2026-11-29: 10 of 10 for a body of 1 MB; with 30 KB the connection stays open.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check hypercorn==0.18.0 uvicorn==0.54.0

cat >"$folder/application.py" <<'PYTHON'
async def answer(scope, receive, send):
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
PYTHON

cat >"$folder/ask.py" <<'PYTHON'
import socket
import sys
import time


def ask(port, size):
    for _ in range(100):
        try:
            stream = socket.create_connection(("127.0.0.1", port), 5)
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    stream.sendall(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
    answer = b""
    while not answer.endswith(b"\r\n\r\nok"):
        piece = stream.recv(65536)
        if not piece:
            return "no answer"
        answer += piece
    announced = b"connection: close" in answer.lower()
    stream.settimeout(2)
    try:
        closed = stream.recv(1) == b""
    except TimeoutError:
        closed = False
    except ConnectionResetError:
        closed = True
    return f"{'closed' if closed else 'open'}, {'announced' if announced else 'not announced'}"


port, size = int(sys.argv[1]), int(sys.argv[2])
print(", ".join(sorted({ask(port, size) for _ in range(5)})))
PYTHON

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
hypercorn=$(free_port) uvicorn=$(free_port)
cd "$folder"
env/bin/hypercorn application:answer --bind "127.0.0.1:$hypercorn" >/dev/null 2>&1 &
env/bin/python -m uvicorn application:answer --port "$uvicorn" --log-level error >/dev/null 2>&1 &

failed=0
expect() {
  local seen
  seen=$(env/bin/python ask.py "$2" "$3")
  printf '%-20s body of %8d bytes, not read: %s\n' "$1" "$3" "$seen"
  [ "$seen" = "$4" ] || { echo "  expected: $4"; failed=1; }
}
expect 'Hypercorn 0.18.0' "$hypercorn" 1000000 'closed, not announced'
expect 'Hypercorn 0.18.0' "$hypercorn" 30000 'open, not announced'
expect 'uvicorn 0.54.0' "$uvicorn" 1000000 'open, not announced'
exit "$failed"
