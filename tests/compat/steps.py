"""What every server is put through, in this order, each step a function that returns a remark or raises `Failed`."""

import os
import signal
import subprocess
import time

from load import Load
from penstock import WAIT_SECONDS, Failed, is_running, wait_for

DOCUMENT_LINES_MAX = 12
# So many requests begin after a change, so that what it broke is seen.
REQUESTS_AFTER = 20
# Fewer requests during a change prove nothing.
REQUESTS_DURING = 20
# Long enough that a killed process has some in flight.
SLOW_SECONDS = 0.3


class Test:
    """A row and the Penstock that serves it."""

    def __init__(self, row, penstock, client):
        self.row, self.penstock, self.client = row, penstock, client
        self.deployment = f"{row.name}/first"
        self.key = None

    def apply(self, document):
        path = self.penstock.root / "document.yaml"
        path.write_text(document)
        self.penstock.run("apply", "-f", str(path), "--wait", "--timeout", f"{WAIT_SECONDS}s")

    def scale(self, count):
        self.penstock.run("scale", self.deployment, "--instances", str(count))
        self.penstock.wait_for_instances(self.deployment, count)


def served(test):
    """The document is short, and makes one ready instance, which answers."""
    document = test.row.document().read_text()
    lines = [line for line in document.splitlines() if line.strip()]
    if len(lines) > DOCUMENT_LINES_MAX:
        raise Failed(f"the document has {len(lines)} lines; at most {DOCUMENT_LINES_MAX}")
    test.apply(document)
    test.penstock.wait_for_instances(test.deployment, 1)
    test.key = test.penstock.get("keys", test.row.name)["primary"]
    with Load(test.penstock, test.row, test.key, threads=1) as load:
        after(load, 1)
    none_failed(load, least=1)
    everywhere = [address for address in test.penstock.listening() if not address.startswith("loopback")]
    return "listens on all addresses" if everywhere else None


def client_works(test):
    """The server's own client, which knows nothing of Penstock, does what its manual says."""
    base = f"{test.penstock.gateway.rstrip('/')}/endpoints/{test.row.name}"
    command = [str(test.client.bin / "python"), str(test.row.script()), base, test.key]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(f"the client took more than {WAIT_SECONDS} s") from None
    if done.returncode != 0:
        raise Failed(" | ".join(done.stderr.strip().splitlines()[-3:]))


def scales(test):
    """1 to 3 to 1 instances, and no request fails."""
    with Load(test.penstock, test.row, test.key) as load:
        after(load, 1)
        test.scale(3)
        after(load)
        answering = len({outcome.pid for outcome in load.outcomes})
        test.scale(1)
        after(load)
    none_failed(load)
    if answering < 3:
        raise Failed(f"only {answering} processes answered while there were 3 instances")
    return f"{len(load.outcomes)} requests, {answering} processes"


def worker_killed(test):
    """A process that computes answers is killed: only requests in flight then fail, as 502, and it is replaced."""
    test.scale(2)
    with Load(test.penstock, test.row, test.key, threads=4, seconds=SLOW_SECONDS) as load:
        answering = lambda outcomes: len({outcome.pid for outcome in outcomes[-20:]}) >= 2  # noqa: E731
        if not load.wait(answering, WAIT_SECONDS):
            raise Failed(f"only one process answers: {summary(load)}")
        none_failed(load, least=0)
        before = {outcome.pid for outcome in load.outcomes}
        victim = load.outcomes[-1].pid
        # So that it has some as well.
        load.wait(lambda _: load.in_flight == len(load.threads), WAIT_SECONDS)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        wait_for(f"process {victim} is gone", lambda: not is_running(victim))
        gone = time.monotonic()
        replaced = load.wait(lambda outcomes: {outcome.pid for outcome in outcomes} - before - {None}, WAIT_SECONDS)
        after(load)
    lost_as = test.row.lost_as
    in_flight = lambda outcome: outcome.began <= gone and outcome.ended >= killed  # noqa: E731
    if late := [outcome for outcome in load.failures() if not in_flight(outcome)]:
        times = ", ".join(f"{outcome.began - gone:.3f} to {outcome.ended - gone:.3f} s" for outcome in late[:5])
        problems = "; ".join(sorted({outcome.problem for outcome in late})[:3])
        raise Failed(f"{len(late)} of {len(load.outcomes)} requests failed that were not in flight: {problems}"
                     f" ({times} after it was gone)")  # fmt: skip
    none_failed(load, but=lambda outcome: outcome.status == lost_as)
    if not replaced:
        raise Failed(f"no process took its place within {WAIT_SECONDS} s")
    test.penstock.wait_for_instances(test.deployment, 2)
    return f"{len(load.failures())} of {len(load.outcomes)} requests failed, in flight then, as {lost_as}"


def replaced(test):
    """A changed command takes the place of the old one, and no request fails."""
    document = test.row.document().read_text()
    variable = 'REVISION: "2"'
    changed = document.replace("env: {", f"env: {{{variable}, ", 1)
    if changed == document:
        changed = document.replace("spec: {backend", f"spec: {{env: {{{variable}}}, backend", 1)
    if changed == document:
        raise Failed("its document has no place for a variable: neither `env: {` nor `spec: {backend`")
    # Whatever the step before left behind.
    test.scale(1)
    with Load(test.penstock, test.row, test.key) as load:
        after(load, 1)
        test.apply(changed)
        test.penstock.wait_for_instances(test.deployment, 1)
        done = time.monotonic()
        after(load)
    none_failed(load)
    if old := [outcome for outcome in load.outcomes if outcome.began > done and outcome.revision != "2"]:
        raise Failed(f"{len(old)} answers after the replacement came from the old command")
    return f"{len(load.outcomes)} requests"


def deleted(test):
    """No process, port or file of the server is left, and Penstock ends."""
    test.penstock.run("delete", "endpoint", test.row.name)
    wait_for(lambda: f"its processes end; left: {test.penstock.processes()}", lambda: not test.penstock.processes())
    if ports := test.penstock.listening():
        raise Failed(f"still listening: {', '.join(ports)}")
    if files := test.penstock.left_files():
        raise Failed(f"files are left outside the data folder: {', '.join(files[:6])}")
    test.penstock.stop()


def after(load, count=REQUESTS_AFTER):
    """Waits until so many requests that begin from now on have an outcome."""
    if not load.wait_for_more(count, WAIT_SECONDS):
        raise Failed(f"fewer than {count} requests ended within {WAIT_SECONDS} s: {summary(load)}")


def none_failed(load, but=lambda outcome: False, least=REQUESTS_DURING):
    failed = [outcome for outcome in load.failures() if not but(outcome)]
    if failed:
        problems = sorted({outcome.problem for outcome in failed})
        raise Failed(f"{len(failed)} of {len(load.outcomes)} requests failed: {'; '.join(problems[:3])}")
    if len(load.outcomes) < least:
        raise Failed(f"only {len(load.outcomes)} requests were sent meanwhile")


def summary(load):
    problems = [outcome.problem for outcome in load.failures()]
    return f"{len(load.outcomes)} requests, {len(problems)} failed{': ' + problems[-1] if problems else ''}"


# Each with the head of its column.
STEPS = [
    ("ready", served),
    ("client", client_works),
    ("1 → 3 → 1", scales),
    ("worker killed", worker_killed),
    ("replaced", replaced),
    ("deleted", deleted),
]
