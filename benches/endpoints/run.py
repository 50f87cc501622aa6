#!/usr/bin/env python3
"""The marginal cost of an endpoint: memory, CPU in steady state and CPU to apply it, at 100, 1,000 and
10,000 endpoints.

A run starts the real `penstock serve` (embedded, all services) in an empty folder and adds endpoints
through the API, in steps. Each has a deployment with one simulated instance and all the traffic, and
an autoscale rule, so that every service handles it. At each step it waits until all have succeeded and
the gateway has every route, waits for a steady state, and measures for some seconds: CPU time of all threads (by
the scheduler's own clock, in ns) and memory (PSS, and its anonymous part). Half of the runs are idle; in
the others a constant load is spread evenly over all endpoints, at a rate per endpoint.

Results are marginal: the difference between two steps, divided by the endpoints added between them, as the
median over runs with minimum and maximum. So the cost of the process without endpoints is subtracted. The
first step is shown but not checked: its difference is small compared with the noise of the process itself,
and includes the cost of the 64 buckets once they have any endpoint. The bar compares the last step with the
one before it; another limits the memory of an idle endpoint in the last.

    benches/endpoints/run.py                            the real run (some 50 minutes)
    benches/endpoints/run.py --runs 1 --seconds 10      while working on the code
"""

import argparse
import csv
import http.client
import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BAR = 1.20
# Maximum memory (PSS) of an idle endpoint in the last step, in KiB.
IDLE_MEMORY_MAX = 72.0
WORKERS = 16
MEASURES = [  # column, heading, unit, factor
    ("pss", "memory (PSS)", "KiB", 1 / 1024),
    ("anonymous", "of it anonymous", "KiB", 1 / 1024),
    ("cpu", "CPU, steady", "us/s", 1e6),
    ("apply_cpu", "CPU to apply", "ms", 1e3),
]


def build():
    if os.environ.get("PENSTOCK"):
        return os.environ["PENSTOCK"]
    subprocess.run(["cargo", "build", "--locked", "--release", "--bin", "penstock"], check=True, cwd=ROOT)
    target = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    return str(Path(target) / "release" / "penstock")


class Server:
    def __init__(self, binary):
        self.folder = tempfile.mkdtemp(prefix="penstock-endpoints-")
        ready = Path(self.folder) / "ready.json"
        self.log = open(Path(self.folder) / "serve.log", "w")
        self.process = subprocess.Popen(
            [binary, "serve", "--data", self.folder, "--control-addr", "127.0.0.1:0", "--gateway-addr", "127.0.0.1:0",
             "--ready-file", str(ready)], stdin=subprocess.DEVNULL, stderr=self.log, stdout=self.log)
        deadline = time.monotonic() + 60
        while not ready.exists() or not ready.read_text().strip().endswith("}"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"penstock did not start: see {self.folder}/serve.log")
            time.sleep(0.05)
        at = json.loads(ready.read_text())
        self.control, self.gateway = urlparse(at["control"]), urlparse(at["gateway"])
        self.token = json.loads((Path(self.folder) / "client.json").read_text())["token"]
        self.local = threading.local()

    def call(self, method, path, body=None, headers=None):
        connection = getattr(self.local, "connection", None)
        if connection is None:
            connection = self.local.connection = http.client.HTTPConnection(self.control.netloc, timeout=120)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"authorization": f"Bearer {self.token}", "content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        answer = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {answer[:300]!r}")
        return json.loads(answer) if answer[:1] in b"{[" else answer.decode()

    def cpu(self):
        """CPU seconds of all current threads; none of them exits during a measurement."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                pass
        return total / 1e9

    def cpu_ticks(self):
        """CPU seconds of the process, including exited threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self):
        found = {}
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            found[name] = int(rest.split()[0]) * 1024
        return found["Pss"], found["Anonymous"]

    def stop(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def name(index):
    return f"e-{index:05}"


def documents(index):
    endpoint = name(index)
    yield f"/v1/endpoints/{endpoint}", {
        "apiVersion": "penstock/v1", "kind": "Endpoint", "metadata": {"name": endpoint}, "spec": {"auth": "none"}}
    yield f"/v1/endpoints/{endpoint}/deployments/blue", {
        "apiVersion": "penstock/v1", "kind": "Deployment", "metadata": {"name": "blue", "endpoint": endpoint},
        "spec": {"backend": "simulated", "instanceType": "sim", "simulated": {"startDelay": "0s"}}}
    yield f"/v1/endpoints/{endpoint}/traffic", {"traffic": {"blue": 100}}
    metric = {"name": "concurrency", "window": "30s", "aggregation": "average", "perInstance": True}
    yield f"/v1/autoscale/{endpoint}/blue", {
        "apiVersion": "penstock/v1", "kind": "Autoscale",
        "spec": {"target": {"endpoint": endpoint, "deployment": "blue"}, "profiles": [{
            "name": "default", "capacity": {"min": 1, "max": 4, "default": 1}, "rules": [
                {"name": "busy", "metric": metric, "when": "> 4", "scale": {"direction": "out", "by": 1}},
                {"name": "idle", "metric": metric, "when": "< 1", "scale": {"direction": "in", "by": 1}}]}]}}


def apply(server, indexes):
    todo, failed = queue.SimpleQueue(), []
    for index in indexes:
        todo.put(index)

    def work():
        try:
            while not failed:
                for path, body in documents(todo.get_nowait()):
                    server.call("PUT", path, body)
        except queue.Empty:
            pass
        except Exception as error:  # reported by the caller
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(WORKERS)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    if failed:
        raise failed[0]


def caught_up(server, count):
    """Waits until all instances are ready and in the gateway's saved routes."""
    deadline = time.monotonic() + 600
    routes = Path(server.folder) / "gateway-routes.json"
    while time.monotonic() < deadline:
        # The server may have closed this idle connection.
        server.local.connection = None
        metrics = server.call("GET", "/metrics")
        ready = sum(line.endswith(" 1") for line in metrics.splitlines()
                    if line.startswith("penstock_instances{") and 'state="ready"' in line)
        if ready >= count:
            # The gateway saves routes with a delay.
            saved = json.loads(routes.read_text())["routes"] if routes.exists() else []
            served = sum(bool(d["instances"]) for route in saved if route.get("route") for d in route["route"]["deployments"].values())
            if served >= count:
                return
        time.sleep(0.5)
    sys.exit(f"{count} endpoints were not ready in time")


class Load(threading.Thread):
    """Requests at a steady rate to all endpoints in turn. The responses do not matter: nothing listens behind
    simulated instances, but requests are routed, counted and measured."""

    def __init__(self, server, count, rate):
        super().__init__(daemon=True)
        self.server, self.count, self.rate = server, count, rate * count
        self.sent, self.ended = 0, threading.Event()

    def run(self):
        connection = http.client.HTTPConnection(self.server.gateway.netloc, timeout=60)
        began = time.monotonic()
        while not self.ended.is_set():
            due = int((time.monotonic() - began) * self.rate)
            while self.sent < due and not self.ended.is_set():
                connection.request("POST", f"/endpoints/{name(self.sent % self.count)}/score", b"{}")
                response = connection.getresponse()
                response.read()
                if response.status == 404:
                    sys.exit("the gateway does not know an endpoint")
                self.sent += 1
            time.sleep(0.005)


def one_run(binary, options, run, loaded):
    server = Server(binary)
    rows, present = [], 0
    try:
        time.sleep(3)
        for count in [0, *options.steps]:
            cpu, began = server.cpu_ticks(), time.monotonic()
            apply(server, range(present, count))
            took = time.monotonic() - began
            caught_up(server, count)
            waited = time.monotonic() - began
            apply_cpu = server.cpu_ticks() - cpu
            load = Load(server, count, options.rate) if loaded and count else None
            if load:
                load.start()
            time.sleep(options.settle)
            sent, cpu, began = load.sent if load else 0, server.cpu(), time.monotonic()
            pss, anonymous = [], []
            while time.monotonic() < began + options.seconds:
                time.sleep(1)
                for values, value in zip((pss, anonymous), server.memory()):
                    values.append(value)
            seconds = time.monotonic() - began
            cpu = (server.cpu() - cpu) / seconds
            rate = ((load.sent if load else 0) - sent) / seconds
            if load:
                load.ended.set()
                load.join()
            rows.append({
                "run": run, "load": int(loaded), "endpoints": count, "added": count - present, "cpu": cpu,
                "pss": statistics.median(pss), "anonymous": statistics.median(anonymous), "apply_cpu": apply_cpu,
                "apply_seconds": took, "caught_up_seconds": waited, "rate": rate})
            print(f"  {count:>6} endpoints: {statistics.median(pss) / 2**20:7.1f} MiB, CPU {cpu * 100:6.2f} %, "
                  f"{rate:.0f} requests/s; applied in {took:.1f} s, caught up after {waited:.1f} s, {apply_cpu:.1f} s of CPU", flush=True)
            present = count
    finally:
        server.stop()
    return rows


def marginal(rows, column):
    """For each step: the cost per added endpoint."""
    costs = []
    for before, after in zip(rows, rows[1:]):
        more = after[column] - before[column]
        if column == "apply_cpu":
            # Existing endpoints cost CPU meanwhile; they were added evenly, so subtract half of the current cost.
            more = after[column] - (before["cpu"] + after["cpu"]) / 2 * after["caught_up_seconds"]
        costs.append(more / after["added"])
    return costs


def report(runs, options):
    steps = [0, *options.steps]
    names = [f"{a:,} to {b:,}" for a, b in zip(steps, steps[1:])]
    missed = []
    for loaded in (False, True):
        of_kind = [rows for rows in runs if rows[0]["load"] == loaded]
        if not of_kind:
            continue
        print(f"\nper added endpoint, {f'{options.rate} requests/s each' if loaded else 'idle'}, median of {len(of_kind)} runs (minimum to maximum):")
        print(f"  {'':18}" + "".join(f"{step:>30}" for step in names) + "   last/before")
        for column, heading, unit, factor in MEASURES:
            costs = list(zip(*(marginal(rows, column) for rows in of_kind)))
            medians = [statistics.median(of_step) * factor for of_step in costs]
            cells = [f"{median:.2f} ({min(c) * factor:.2f} to {max(c) * factor:.2f})" for median, c in zip(medians, costs)]
            line = f"  {heading + ', ' + unit:18}" + "".join(f"{cell:>30}" for cell in cells)
            if len(medians) > 1:
                ratio = medians[-1] / medians[-2]
                line += f"   {ratio:.2f}"
                if ratio > BAR:
                    missed.append(f"{heading}, {'loaded' if loaded else 'idle'}: {ratio:.2f}")
            if column == "pss" and not loaded and medians[-1] > IDLE_MEMORY_MAX:
                missed.append(f"{heading}, idle: {medians[-1]:.1f} KiB")
            print(line)
    print(f"\nbars: last/before at most {BAR:.2f}, at most {IDLE_MEMORY_MAX:.0f} KiB of memory for an idle endpoint: " + ("missed by " + "; ".join(missed) if missed else "met"))
    return not missed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind")
    parser.add_argument("--seconds", type=float, default=60, help="seconds per measurement; full minutes, since usage is written at the end of each")
    parser.add_argument("--settle", type=float, default=30, help="seconds between applying and measuring")
    parser.add_argument("--rate", type=float, default=0.02, help="requests per second to each endpoint")
    parser.add_argument("--steps", type=lambda text: [int(part) for part in text.split(",")], default=[100, 1000, 10000])
    parser.add_argument("--kinds", default="idle,load")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for raw results")
    options = parser.parse_args()
    binary, runs = build(), []
    for run in range(options.runs):
        for kind in options.kinds.split(","):
            print(f"run {run + 1} of {options.runs}, {kind}:", flush=True)
            runs.append(one_run(binary, options, run, kind == "load"))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{time.strftime('%Y%m%dT%H%M%S')}.csv"
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(runs[0][0]))
        writer.writeheader()
        [writer.writerow(row) for rows in runs for row in rows]
    met = report(runs, options)
    print(f"raw results: {file}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
