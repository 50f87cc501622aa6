"""What both halves of the benchmark need."""

import http.client
import socket


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def ask(port, method, path, timeout=5):
    """Status, error code and body of an answer; None where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, b"{}" if method == "POST" else None)
        response = connection.getresponse()
        return response.status, response.getheader("penstock-error-code"), response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def bar(name, figure, most, unit):
    return {"name": name, "figure": figure, "bar": most, "unit": unit, "holds": figure is not None and figure <= most}
