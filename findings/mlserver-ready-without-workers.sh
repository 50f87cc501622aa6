#!/usr/bin/env bash
# MLServer 1.7.1: after the process of its (default) parallel worker was killed, inferences are answered 500, while readiness,
# liveness and the model's readiness all answer 200. With MLSERVER_PARALLEL_WORKERS=0 there is no such process.
#
# Why it matters: kernels kill the largest process when memory is short. A proxy that trusts readiness keeps sending
# requests, and the server that fails fastest gets the most of them.
# Observed on 2026-12-01 with Python 3.11: for 2 to 5 s, until the process has been replaced. uvloop is pinned because newer ones
# end that process at its start.
set -euo pipefail

folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill -KILL -- "-$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlserver==1.7.1 uvloop==0.21.0

mkdir "$folder/model"
cd "$folder/model"
cat >model.py <<'PYTHON'
import os

import numpy
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Pid(MLModel):
    async def predict(self, payload):
        output = NumpyCodec.encode_output("pid", numpy.array([os.getpid()], dtype=numpy.int64))
        return InferenceResponse(model_name=self.name, outputs=[output])
PYTHON
echo '{"name": "pid", "implementation": "model.Pid"}' >model-settings.json

cat >../ask.py <<'PYTHON'
import http.client
import json
import os
import signal
import sys
import time

port = int(sys.argv[1])
tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
paths = ["/v2/models/pid/infer", "/v2/health/ready", "/v2/health/live", "/v2/models/pid/ready"]


def ask(path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    body = json.dumps({"inputs": [tensor]}) if path.endswith("infer") else None
    connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()


def statuses():
    return " ".join(str(ask(path)[0]) for path in paths)


deadline = time.monotonic() + 120
while True:
    try:
        if ask("/v2/models/pid/ready")[0] == 200:
            break
    except OSError:
        pass
    assert time.monotonic() < deadline, "not ready within 120 s"
    time.sleep(0.1)
before = statuses()
os.kill(json.loads(ask(paths[0])[1])["outputs"][0]["data"][0], signal.SIGKILL)
begin, after = time.monotonic(), before
while after == before and time.monotonic() < begin + 30:
    after = statuses()
    time.sleep(0.02)
recovered = after
while recovered != before and time.monotonic() < begin + 30:
    recovered = statuses()
    time.sleep(0.02)
print(f"inferences after {time.monotonic() - begin:.1f} s: {recovered}", file=sys.stderr)
print(f"{before}, then {after}")
PYTHON

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
set -m
MLSERVER_HOST=127.0.0.1 MLSERVER_HTTP_PORT=$port MLSERVER_GRPC_PORT=0 MLSERVER_METRICS_PORT=0 \
  ../env/bin/mlserver start . >../log 2>&1 &
server=$!
disown
set +m
seen=$(python3 ../ask.py "$port")
expected='200 200 200 200, then 500 200 200 200'
echo "MLServer 1.7.1, inference, ready, live, model ready; before and after its worker was killed: $seen"
[ "$seen" = "$expected" ] || { echo "  expected: $expected"; exit 1; }
