"""Constant load through the gateway, every outcome of which is recorded."""

import http.client
import json
import threading
import time
from dataclasses import dataclass

# The time after which a request counts as failed: longer than any model here takes on a busy machine.
REQUEST_SECONDS = 120
PAUSE_SECONDS = 0.1


@dataclass
class Outcome:
    """One request: when it began and ended, and what came back."""

    began: float
    ended: float
    status: int | None
    pid: int | None
    revision: str | None
    problem: str | None


class Load:
    """Threads that each send a request, wait for its answer, and pause: `with Load(…) as load`."""

    def __init__(self, penstock, row, key, threads=2, seconds=0.0):
        self.penstock, self.row, self.key, self.seconds = penstock, row, key, seconds
        self.outcomes = []
        self.in_flight = 0
        self.changed = threading.Condition()
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(threads)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        for thread in self.threads:
            thread.join()

    def work(self):
        connection = self.penstock.connection(REQUEST_SECONDS)
        while not self.ending.wait(PAUSE_SECONDS):
            with self.changed:
                self.in_flight += 1
                self.changed.notify_all()
            outcome = self.ask(connection)
            if outcome.problem:
                connection.close()
            with self.changed:
                self.in_flight -= 1
                self.outcomes.append(outcome)
                self.changed.notify_all()
        connection.close()

    def ask(self, connection):
        path, request = self.row.request(self.seconds)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        began, status = time.monotonic(), None
        pid = revision = problem = None
        try:
            connection.request("POST", f"/endpoints/{self.row.name}{path}", json.dumps(request), headers)
            response = connection.getresponse()
            status, body = response.status, response.read()
            if status == 200:
                pid, revision = self.row.reading(json.loads(body))
            else:
                code = response.getheader("penstock-error-code")
                problem = f"{status} {code or ''} {body[:160].decode(errors='replace')}".strip()
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            problem = f"no valid answer: {error!r}"
        return Outcome(began, time.monotonic(), status, pid, revision, problem)

    def wait(self, condition, seconds):
        """Waits until the outcomes so far satisfy `condition`; whether they did in time."""
        with self.changed:
            return self.changed.wait_for(lambda: condition(self.outcomes), seconds)

    def wait_for_more(self, count, seconds):
        """Waits for `count` further outcomes of requests that begin from now on."""
        now = time.monotonic()
        return self.wait(
            lambda outcomes: sum(outcome.began > now for outcome in outcomes) >= count, seconds
        )

    def failures(self):
        return [outcome for outcome in self.outcomes if outcome.problem]
