"""Instructions per request of the gateway, counted by callgrind: the same count again and again, whatever
else the machine does, so that a change of one percent shows.

A run is made with few requests and one with many; what they differ by is what the requests cost. Counted are
instructions of the process itself, not of the kernel.
"""

import re
import signal
import socket
import statistics
import subprocess
import time

FEW, MANY = 2_000, 12_000
CONNECTIONS = 16
PATIENCE = 120


def request(key):
    head = "POST /endpoints/bench/score HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: 1024\r\n"
    if key:
        head += f"authorization: Bearer {key}\r\n"
    return head.encode() + b"\r\n" + b"x" * 1024


def read_answer(stream):
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = stream.recv(65536)
        if not piece:
            raise SystemExit("the gateway closed a connection while its instructions were counted")
        answer += piece
    head, body = answer.split(b"\r\n\r\n", 1)
    if not head.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"the gateway answered {head.splitlines()[0].decode()} while its instructions were counted")
    length = int(re.search(rb"(?i)content-length: (\d+)", head).group(1))
    while len(body) < length:
        body += stream.recv(65536)


def drive(port, requests, key):
    """Sends this many requests, one at a time on each connection."""
    streams = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(CONNECTIONS)]
    text = request(key)
    for _ in range(requests // CONNECTIONS):
        for stream in streams:
            stream.sendall(text)
        for stream in streams:
            read_answer(stream)
    for stream in streams:
        stream.close()


def collected(command, port, requests, key, ready):
    """Instructions of a complete run."""
    process = subprocess.Popen(["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *command],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        ready(port)
        drive(port, requests, key)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=PATIENCE)[1]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    found = re.search(r"Collected : (\d+)", said)
    if not found:
        raise SystemExit(f"callgrind did not say what it counted:\n{said}")
    return int(found.group(1))


def per_request(command, port, key, ready):
    few = collected(command, port, FEW, key, ready)
    many = collected(command, port, MANY, key, ready)
    return (many - few) / (MANY - FEW)


def compare(systems, runs, ready):
    """`systems`: name -> (command, port, key). Returns name -> counts, measured in turn."""
    counts = {name: [] for name in systems}
    for number in range(1, runs + 1):
        for name, (command, port, key) in systems.items():
            started = time.monotonic()
            counts[name].append(per_request(command, port, key, ready))
            print(f"instructions {number}/{runs}: {name:<12} {counts[name][-1]:>9.0f} a request ({time.monotonic() - started:.0f} s)", flush=True)
    return counts


def table(counts, bar):
    """Lines to print, data for the results, and whether the bar is met."""
    lines, summary, holds = ["", f"{'system':<12} {'instructions/request':>21}   medians of {len(next(iter(counts.values())))} counts"], {}, True
    for name, values in counts.items():
        summary[name] = {"median": statistics.median(values), "counts": values}
        lines.append(f"{name:<12} {statistics.median(values):>21.0f}")
    for workload in ("w1", "w2"):
        ours, other = f"ours-{workload}", f"beside-{workload}"
        if other in counts:
            ratio = summary[ours]["median"] / summary[other]["median"]
            holds = holds and ratio <= bar
            lines.append(f"{workload.upper()} instructions ours / beside {ratio:.4f}  at most {bar:.2f}: {'holds' if ratio <= bar else 'DOES NOT HOLD'}")
            summary[f"{workload} ratio"] = ratio
    return lines, summary, holds
