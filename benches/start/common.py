"""Helpers for both halves of the benchmark."""

import http.client
import socket
import sys
from pathlib import Path


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def ask(port, method, path, timeout=5):
    """Status, error code and body of a response; None if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, b"{}" if method == "POST" else None)
        response = connection.getresponse()
        return response.status, response.getheader("penstock-error-code"), response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def fail(log, why):
    """Aborts the run with the end of the log, whose folder is removed."""
    lines = Path(log).read_text(errors="replace").splitlines()
    sys.exit("\n".join([*lines[-20:], f"{why}; the last lines of its log are above"]))


def bar(name, figure, limit, unit, at_least=False):
    """A value (or None) with its upper or lower limit."""
    holds = figure is not None and (figure >= limit if at_least else figure <= limit)
    return {"name": name, "figure": figure, "bar": limit, "atLeast": at_least, "unit": unit, "holds": holds}
