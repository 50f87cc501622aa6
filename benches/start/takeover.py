"""Two autoscalers share a generated log on PostgreSQL and Kafka; one is killed (SIGKILL). Measured is how long
it takes until the other evaluates the buckets that were the killed one's: from the kill, and from when Kafka
assigns them to it.

To see evaluations, a deployment in (nearly) every bucket is pinned to another count after the kill: whoever
has a bucket decides at once, and the decision carries the time of its evaluation. What was assigned and when
stands in the log of the process that survives (PENSTOCK_LOG=runtime::consumer=debug)."""

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
# So many endpoints are pinned: as many again as there are buckets, so that few buckets have none.
PINNED = 4 * BUCKETS
# The first one's autoscaler is the first that is killed.
NAMES = ("a", "b")
TIMEOUT = 120

KILL_MAX = 9.0
ASSIGNED_MAX = 2.0


def bucket(endpoint):
    """As Kafka's default partitioner: murmur2 of the key."""
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
    """Of an RFC 3339 time in UTC, since 1970."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


class Stack:
    """A database and topics of our own; on servers that are up already, or on servers of our own."""

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
    """One service in a process of its own."""

    def __init__(self, binary, stack, folder, name, service):
        self.folder, self.name = folder / name, name
        self.port = free_port()
        listens = "--control-addr" if service == "control" else "--admin-addr"
        self.log = folder / f"{name}.log"
        # What an earlier process of this name has said is its own.
        self.said_before = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [binary, "serve", "--services", service, "--store", stack.store, "--bus", stack.bus,
                 "--data", str(self.folder), listens, f"127.0.0.1:{self.port}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "PENSTOCK_LOG": "info,runtime::consumer=debug"})

    def until_ready(self):
        wait(lambda: (ask(self.port, "GET", "/readyz") or [0])[0] == 200, f"{self.name} is not ready", self)

    def must_live(self):
        if self.process.poll() is not None:
            fail(self.log, f"{self.name} ended with {self.process.returncode}")

    def told(self, message):
        """What the log of this process says of buckets, with when: [(time, {bucket, ...}), ...]."""
        with open(self.log, "rb") as log:
            log.seek(self.said_before)
            lines = log.read().decode(errors="replace").splitlines()
        told = [json.loads(line) for line in lines if message in line]
        return [(seconds(one["timestamp"]), {int(number) for number in re.findall(r"\d+", one["fields"]["buckets"])})
                for one in told if one["fields"]["message"] == message]

    def buckets(self):
        """What it has, by its own word."""
        had, told = set(), [(at, True, of) for at, of in self.told("buckets are assigned")]
        told += [(at, False, of) for at, of in self.told("buckets are revoked")]
        for _, given, of in sorted(told, key=lambda one: one[0]):
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
            service.must_live()
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
        """Whether there is such an endpoint to pin: some are gone at the end of the log."""
        status, text = self.call("PUT", f"/v1/autoscale/{endpoint}/blue/pin", {"instances": instances})
        if status not in (200, 404):
            sys.exit(f"{endpoint} could not be pinned: {status} {text[:300]!r}")
        return status == 200

    def decided(self, endpoint, count):
        """When the pinned count was decided; None: not yet."""
        _, text = self.call("GET", f"/v1/decisions?endpoint={endpoint}&deployment=blue&limit=1")
        for decision in json.loads(text)["items"]:
            if decision["outcome"] == "pinned" and decision["granted"] == count:
                return seconds(decision["time"])
        return None


def kill_one(killed, other, api, count):
    """One takeover, with the pins to a count that was not decided before."""
    had = killed.buckets()
    killed_at = time.time()
    killed.end(signal.SIGKILL)
    endpoints = [name for name in (f"e-{index:05}" for index in range(PINNED)) if bucket(name) in had]
    # Long before Kafka misses it.
    pinned = [name for name in endpoints if api.pin(name, count)]
    pins_took = time.time() - killed_at
    assigned, decided = {}, {}

    def is_over():
        for at, of in other.told("buckets are assigned"):
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
    caught_up = [at for at, of in other.told("buckets are caught up with") if of & had and at > killed_at]
    takeover = {"moved": len(had), "seen": len(evaluated), "pins": pins_took,
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


def judge(takeovers):
    most = lambda field: max(takeover[field] for takeover in takeovers)
    return [bar("takeover, from assignment to evaluation", most("fromAssignment"), ASSIGNED_MAX, "s"),
            bar("takeover, from kill to evaluation", most("fromKill"), KILL_MAX, "s")]
