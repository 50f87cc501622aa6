"""Two autoscalers share a generated log on PostgreSQL and Kafka; one is killed (SIGKILL). Measures how long
it takes until the other evaluates the buckets of the killed one: from the kill, and from their assignment by
Kafka.

To observe evaluations, a deployment in (nearly) every bucket is pinned to another count after the kill: the
owner of a bucket decides at once, and the decision contains the time of its evaluation. Assignments are taken
from the log of the surviving process (PENSTOCK_LOG=runtime::consumer=debug)."""

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from common import ask, bar, fail, free_port

ROOT = Path(__file__).resolve().parent.parent.parent
BUCKETS = 64
# Number of pinned endpoints: several per bucket, so that few buckets have none.
PINNED = 4 * BUCKETS
# The first autoscaler is killed first.
NAMES = ("a", "b")
TIMEOUT = 120

KILL_MAX = 9.0
ASSIGNED_MAX = 2.0


def bucket(endpoint):
    """The bucket by Kafka's default partitioner: murmur2 of the key."""
    data, mask = f"default/{endpoint}".encode(), 0xFFFFFFFF
    m, value = 0x5BD1E995, 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at:at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        value = value * m & mask ^ k
    if data[whole:]:
        value = (value ^ int.from_bytes(data[whole:], "little")) * m & mask
    value = (value ^ value >> 13) * m & mask
    value ^= value >> 15
    return (value & 0x7FFFFFFF) % BUCKETS


def seconds(text):
    """Unix time of an RFC 3339 time in UTC."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


class Stack:
    """A new database and new topics, on running servers or on private ones."""

    def __init__(self):
        env = ROOT / ".stack" / "env"
        self.is_ours = not env.exists()
        self.script("up")
        named = dict(line.split("=", 1) for line in env.read_text().splitlines())
        name = f"penstock_start_{os.getpid()}"
        subprocess.run([ROOT / "scripts/stack/postgres.sh", "createdb", named["PENSTOCK_STORE"], name], check=True, stdout=subprocess.DEVNULL)
        self.store = re.sub(r"/[^/]*$", f"/{name}", named["PENSTOCK_STORE"])
        self.bus = re.sub(r"/[^/]*$", f"/{name}", named["PENSTOCK_BUS"])

    @staticmethod
    def script(word):
        subprocess.run([ROOT / "scripts/stack/stack.sh", word], check=True)

    def end(self):
        if self.is_ours:
            self.script("down")


class Service:
    """One service in a separate process."""

    def __init__(self, binary, stack, folder, name, service):
        self.folder, self.name = folder / name, name
        self.port = free_port()
        listens = "--control-addr" if service == "control" else "--admin-addr"
        self.log = folder / f"{name}.log"
        # Skip the output of an earlier process of this name.
        self.log_offset = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [binary, "serve", "--services", service, "--store", stack.store, "--bus", stack.bus,
                 "--data", str(self.folder), listens, f"127.0.0.1:{self.port}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "PENSTOCK_LOG": "info,runtime::consumer=debug"})

    def until_ready(self):
        wait(lambda: (ask(self.port, "GET", "/readyz") or [0])[0] == 200, f"{self.name} is not ready", self)

    def check_running(self):
        if self.process.poll() is not None:
            fail(self.log, f"{self.name} ended with {self.process.returncode}")

    def log_entries(self, message):
        """Log entries about buckets with this message: [(time, {bucket, ...}), ...]."""
        with open(self.log, "rb") as log:
            log.seek(self.log_offset)
            lines = log.read().decode(errors="replace").splitlines()
        entries = [json.loads(line) for line in lines if message in line]
        return [(seconds(one["timestamp"]), {int(number) for number in re.findall(r"\d+", one["fields"]["buckets"])})
                for one in entries if one["fields"]["message"] == message]

    def buckets(self):
        """The buckets it owns, according to its log."""
        had, changes = set(), [(at, True, of) for at, of in self.log_entries("buckets are assigned")]
        changes += [(at, False, of) for at, of in self.log_entries("buckets are revoked")]
        for _, given, of in sorted(changes, key=lambda one: one[0]):
            had = had | of if given else had - of
        return had

    def end(self, how):
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait()


def wait(until, why, *services):
    deadline = time.monotonic() + TIMEOUT
    while not until():
        for service in services:
            service.check_running()
        if time.monotonic() > deadline:
            sys.exit(f"{why} after {TIMEOUT} s")
        time.sleep(0.05)


class Api:
    def __init__(self, control):
        self.port = control.port
        self.token = json.loads((control.folder / "client.json").read_text())["token"]

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        connection.request(method, path, body and json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, text

    def pin(self, endpoint, instances):
        """Pins an endpoint; returns whether it exists: some are deleted at the end of the log."""
        status, text = self.call("PUT", f"/v1/autoscale/{endpoint}/blue/pin", {"instances": instances})
        if status not in (200, 404):
            sys.exit(f"{endpoint} could not be pinned: {status} {text[:300]!r}")
        return status == 200

    def decided(self, endpoint, count):
        """When the pinned count was decided; None if it was not yet."""
        _, text = self.call("GET", f"/v1/decisions?endpoint={endpoint}&deployment=blue&limit=1")
        for decision in json.loads(text)["items"]:
            if decision["outcome"] == "pinned" and decision["granted"] == count:
                return seconds(decision["time"])
        return None


def kill_one(killed, other, api, count):
    """One takeover; `count` must be one that was not decided before."""
    had = killed.buckets()
    killed_at = time.time()
    killed.end(signal.SIGKILL)
    endpoints = [name for name in (f"e-{index:05}" for index in range(PINNED)) if bucket(name) in had]
    # Well before Kafka notices the kill.
    pinned = [name for name in endpoints if api.pin(name, count)]
    pin_seconds = time.time() - killed_at
    assigned, decided = {}, {}

    def is_over():
        for at, of in other.log_entries("buckets are assigned"):
            if at > killed_at:
                assigned.update({number: at for number in of & had if number not in assigned})
        for name in pinned:
            if name not in decided:
                at = api.decided(name, count)
                if at is not None:
                    decided[name] = at
        return assigned.keys() >= had and len(decided) == len(pinned)

    wait(is_over, "not all moved buckets were evaluated", other)
    evaluated = {}
    for name, at in decided.items():
        evaluated[bucket(name)] = min(at, evaluated.get(bucket(name), at))
    after = [at - killed_at for at in evaluated.values()]
    waited = [at - assigned[number] for number, at in evaluated.items()]
    caught_up = [at for at, of in other.log_entries("buckets are caught up with") if of & had and at > killed_at]
    takeover = {"moved": len(had), "seen": len(evaluated), "pins": pin_seconds,
                "assigned": max(assigned.values()) - killed_at,
                "caughtUp": max(caught_up) - killed_at if caught_up else None,
                "fromKill": max(after), "fromAssignment": max(waited)}
    print(f"  {takeover['moved']} buckets assigned {takeover['assigned']:.2f} s after the kill; all {takeover['seen']} that "
          f"were pinned evaluated {takeover['fromKill']:.2f} s after it, {takeover['fromAssignment']:.2f} s after their assignment", flush=True)
    return takeover


def measure(binary, generator, folder, options):
    print("takeovers:", flush=True)
    stack, services = Stack(), {}
    rng = random.Random(options.seed)
    try:
        subprocess.run([generator, "--data", str(folder / "spare"), "--store", stack.store, "--events", str(options.takeover_events),
                        "--endpoints", str(options.endpoints), "--seed", str(options.seed)], check=True, stdout=subprocess.DEVNULL)
        services["control"] = Service(binary, stack, folder, "control", "control")
        services["control"].until_ready()
        for name in NAMES:
            services[name] = Service(binary, stack, folder, name, "autoscaler")
        takeovers = []
        for number in range(options.runs):
            for name in NAMES:
                services[name].until_ready()
            shared = lambda: sum(len(services[name].buckets()) for name in NAMES) == BUCKETS and all(services[name].buckets() for name in NAMES)
            wait(shared, "the autoscalers do not share the buckets", *services.values())
            time.sleep(rng.uniform(1, options.settle))
            killed, other = NAMES[number % 2], NAMES[1 - number % 2]
            takeovers.append(kill_one(services[killed], services[other], Api(services["control"]), 5 + number))
            services[killed] = Service(binary, stack, folder, killed, "autoscaler")
        return takeovers
    finally:
        for service in services.values():
            service.end(signal.SIGTERM)
        stack.end()


def check_bars(takeovers):
    most = lambda field: max(takeover[field] for takeover in takeovers)
    return [bar("takeover, from assignment to evaluation", most("fromAssignment"), ASSIGNED_MAX, "s"),
            bar("takeover, from kill to evaluation", most("fromKill"), KILL_MAX, "s")]
