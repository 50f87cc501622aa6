#!/usr/bin/env python3
"""Startup time of `penstock serve` on a long log, optionally compared with another build in one run.

A log of EVENTS events over ENDPOINTS endpoints is generated (see generate/main.rs for its contents), and
served once and stopped by the other build (or this one), as an earlier release would have left it: read
models, history, the gateway's saved routes, a token; no snapshots. Each build gets a copy of that folder and
starts on it repeatedly, alone on the machine:

  first    the first start of a new release: everything is folded from the log
  second   after SIGTERM
  killed   after SIGKILL some seconds after it was ready, and once more before it was ready again
  resumed  after SIGKILL at a random time of a first start (this build only)

Measured from the start of the process: until /readyz answers 200; peak memory until then (VmHWM), and
memory some seconds later (VmRSS); when the gateway first answers for an endpoint of the saved routes, and
the longest gap after that; the output of /readyz meanwhile. The files are in the page cache as far as they fit.

With --beside PATH (an earlier `penstock` binary) ratios are checked too. Then two autoscalers share a store
on PostgreSQL and Kafka, and one is killed: takeover.py.

Fails if a bar is missed; prints each with its value.

    benches/start/run.py --beside OTHER/penstock         the real run (an hour, 45 GB of disk)
    benches/start/run.py --events 200000 --runs 2 --only start --keep FOLDER     while working on the code
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import takeover
from common import ask, bar, fail, free_port

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# An endpoint without a key; see generate/endpoint.rs.
PROBED = "e-00000"
POLL = 0.005
REPORT_INTERVAL = 0.25
# Bytes on disk per event including rows, with reserve for what is written while serving.
EVENT_BYTES = 4500
# Faster starts need not report progress.
PROGRESS_FROM = 2.0

READY_MAX = 3.0
FIRST_RATIO_MAX = 1 / 5
SECOND_RATIO_MAX = 1 / 50
MEMORY_RATIO_MAX = 1.3


def build():
    """The binary and the generator."""
    named = os.environ.get("PENSTOCK"), os.environ.get("GENERATE_LOG")
    if all(named):
        return named
    subprocess.run(["cargo", "build", "--locked", "--release", "-p", "penstock", "--bin", "penstock",
                    "--example", "generate_log"], check=True, cwd=ROOT)
    release = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    return named[0] or str(release / "penstock"), named[1] or str(release / "examples" / "generate_log")


class Server:
    """One run of `penstock serve`."""

    started = []

    def __init__(self, binary, folder, log):
        self.control, self.gateway = free_port(), free_port()
        self.log = open(log, "ab")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [binary, "serve", "--data", str(folder), "--control-addr", f"127.0.0.1:{self.control}",
             "--gateway-addr", f"127.0.0.1:{self.gateway}"],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.started.append(self.process)

    def since(self):
        return time.monotonic() - self.began

    def check_running(self):
        if self.process.poll() is not None:
            fail(self.log.name, f"penstock ended with {self.process.returncode}")

    def until_ready(self, timeout):
        """Seconds until it was ready, and what it waited for: [[second, reasons], ...]."""
        waits = []
        while True:
            self.check_running()
            answer = ask(self.control, "GET", "/readyz")
            at = self.since()
            if answer and answer[0] == 200:
                return at, waits
            if answer and answer[0] == 503:
                missing = json.loads(answer[2])["missing"]
                if not waits or is_new_report(waits[-1], at, missing):
                    waits.append([round(at, 3), missing])
            if at > timeout:
                fail(self.log.name, f"not ready after {timeout} s; it waits for {waits[-1:]}")
            time.sleep(POLL)

    def memory(self, field):
        """VmHWM or VmRSS, in MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1)) / 1024

    def end(self, how):
        self.process.send_signal(how)
        began = time.monotonic()
        self.process.wait()
        self.log.close()
        return time.monotonic() - began


def is_new_report(last, at, missing):
    """Whether something else is missing, or a new progress report is due."""
    who = lambda sentences: [sentence.split(":")[0] for sentence in sentences]
    return who(last[1]) != who(missing) or last[1] != missing and at - last[0] >= REPORT_INTERVAL


class Probe(threading.Thread):
    """Polls the gateway for an endpoint. Nothing listens behind simulated instances, so an error about an
    instance shows that the route is known; 404 that it is not."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.over = server, threading.Event()
        self.first, self.last, self.gap, self.answers = None, None, 0.0, {}

    def run(self):
        while not self.over.is_set():
            answer = ask(self.server.gateway, "POST", f"/endpoints/{PROBED}/score")
            at = self.server.since()
            if answer:
                word = f"{answer[0]} {answer[1] or ''}".strip()
                self.answers[word] = self.answers.get(word, 0) + 1
                if answer[0] != 404:
                    if self.first is None:
                        self.first = at
                    else:
                        self.gap = max(self.gap, at - self.last)
                    self.last = at
            time.sleep(4 * POLL)

    def end(self):
        self.over.set()
        self.join()
        return {"firstAnswer": self.first, "longestGap": self.gap, "answers": self.answers}


class Bench:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.rng = random.Random(options.seed)
        self.runs_done = []

    def start(self, build, binary, folder, kind, steady):
        """Starts a server and waits until it is ready; with `steady`, some seconds more. The server keeps running."""
        server = Server(binary, folder, self.folder / f"{build}.log")
        probe = Probe(server)
        probe.start()
        seconds, waits = server.until_ready(self.options.timeout)
        run = {"build": build, "kind": kind, "seconds": seconds, "peak": server.memory("VmHWM"),
                "gateway": probe.end(), "missing": waits}
        if steady:
            time.sleep(self.options.settle)
            server.check_running()
            run["steady"] = server.memory("VmRSS")
        self.runs_done.append(run)
        memory = f", {run['peak']:.0f} MiB at most" + (f", {run['steady']:.0f} MiB then" if steady else "")
        print(f"  {build:7} {kind:8} {seconds:8.2f} s{memory}", flush=True)
        return server, seconds

    def starts(self, build, binary, template, runs):
        folder = self.folder / build
        copy(template, folder)
        server, first = self.start(build, binary, folder, "first", True)
        for kind in ["second"] * runs + ["killed"] * runs:
            if kind == "second":
                server.end(signal.SIGTERM)
            else:
                self.kill(server, binary, folder)
            server, _ = self.start(build, binary, folder, kind, kind == "second")
        server.end(signal.SIGTERM)
        if build == "this":
            self.interrupted(binary, folder, first, runs)
        shutil.rmtree(folder)

    def kill(self, server, binary, folder):
        """Kills the server some time after it was ready; and the next run before it is ready, if that is quick enough."""
        time.sleep(self.rng.uniform(0, self.options.settle))
        server.end(signal.SIGKILL)
        if self.runs_done[-1]["seconds"] < self.options.settle:
            server = Server(binary, folder, server.log.name)
            time.sleep(self.rng.uniform(0, self.runs_done[-1]["seconds"]))
            server.check_running()
            server.end(signal.SIGKILL)

    def interrupted(self, binary, folder, first, runs):
        for _ in range(runs):
            forget_snapshots(folder)
            server = Server(binary, folder, self.folder / "this.log")
            time.sleep(self.rng.uniform(0.05, 0.95) * first)
            server.check_running()
            server.end(signal.SIGKILL)
            server, _ = self.start("this", binary, folder, "resumed", False)
            server.end(signal.SIGTERM)


def copy(template, folder):
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["cp", "-r", "--reflink=auto", str(template), str(folder)], check=True)


def forget_snapshots(folder):
    """Deletes all snapshots, as before the first start with them: they contain nothing that the log does not."""
    with sqlite3.connect(folder / "penstock.db") as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE name IN ('snapshots', 'snapshot_parts')").fetchall():
            db.execute(f"DELETE FROM {table}")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def generate(generator, folder, options):
    """Generates the log, or reuses that of an earlier run."""
    wanted = {name: getattr(options, name) for name in ("events", "endpoints", "seed")}
    known = folder / "generated.json"
    if known.exists():
        log_info = json.loads(known.read_text())
        if log_info["wanted"] == wanted:
            return log_info
        sys.exit(f"{folder} contains a log of {log_info['wanted']}; use another folder with --keep")
    command = [generator, "--data", str(folder / "data")]
    for name, value in wanted.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"wanted": wanted, **json.loads(done.stdout)}


def run_earlier_release(bench, build, binary, template):
    """A run of an earlier release on the generated log, until a clean stop with saved routes."""
    print("an earlier run:", flush=True)
    server, _ = bench.start(build, binary, template, "earlier", False)
    routes = template / "gateway-routes.json"
    deadline = time.monotonic() + bench.options.timeout
    while not (routes.exists() and PROBED in routes.read_text()):
        server.check_running()
        if time.monotonic() > deadline:
            fail(server.log.name, "the gateway has saved no routes")
        time.sleep(0.2)
    # Simulated instances restart with every start; let them.
    time.sleep(bench.options.settle)
    server.end(signal.SIGTERM)
    forget_snapshots(template)


def of(runs_done, build, kind, measure):
    values = [measure(run) for run in runs_done if (run["build"], run["kind"]) == (build, kind)]
    return statistics.median(values) if values else None


def progress_shown(run):
    """How often a number changed in the output of /readyz."""
    numbers = [re.findall(r"\d+", " ".join(missing)) for _, missing in run["missing"]]
    return sum(1 for before, after in zip(numbers, numbers[1:]) if after and before != after)


def check_bars(runs_done, beside):
    seconds = lambda run: run["seconds"]
    kinds = ["first", "second", "killed", "resumed"]
    ours = {kind: of(runs_done, "this", kind, seconds) for kind in kinds}
    slowest = lambda kind: max(run["seconds"] for run in runs_done if (run["build"], run["kind"]) == ("this", kind))
    bars = [bar(f"ready, slowest {kind} start", slowest(kind), READY_MAX, "s") for kind in ("second", "killed")]
    if beside:
        first = of(runs_done, "beside", "first", seconds)
        theirs = {kind: of(runs_done, "beside", kind, seconds) or first for kind in kinds}
        ratio = lambda kind, other: ours[kind] / theirs[other]
        bars += [bar(f"{kind} start, ratio to the other build", ratio(kind, other), most, "")
                 for kind, other, most in [("second", "second", SECOND_RATIO_MAX), ("killed", "killed", SECOND_RATIO_MAX),
                                           ("first", "first", FIRST_RATIO_MAX), ("resumed", "first", FIRST_RATIO_MAX)]]
    steady = statistics.median(run["steady"] for run in runs_done if run["build"] == "this" and "steady" in run)
    for kind in kinds:
        peak = of(runs_done, "this", kind, lambda run: run["peak"])
        bars.append(bar(f"peak memory, {kind} start, ratio to steady", peak / steady, MEMORY_RATIO_MAX, ""))
    first = next(run for run in runs_done if (run["build"], run["kind"]) == ("this", "first"))
    gateway = first["gateway"]
    bars.append(bar("gateway serves, first start", gateway["firstAnswer"], min(READY_MAX, first["seconds"]), "s"))
    bars.append(bar("gateway, longest gap meanwhile", gateway["longestGap"], READY_MAX, "s"))
    if first["seconds"] >= PROGRESS_FROM:
        bars.append(bar("progress reports of the first start", progress_shown(first), 2, "", at_least=True))
    return bars


def show(runs_done, bars, log_info):
    lines = []
    if runs_done:
        lines += [f"{log_info['events']:,} events, {log_info['endpoints']:,} endpoints, seed {log_info['seed']}", "",
                  f"{'build':8} {'start':8} {'runs':>4} {'ready, s':>9} {'least':>8} {'most':>8} {'peak, MiB':>10} {'steady, MiB':>12}"]
    for build, kind in dict.fromkeys((run["build"], run["kind"]) for run in runs_done):
        chosen = [run for run in runs_done if (run["build"], run["kind"]) == (build, kind)]
        seconds = [run["seconds"] for run in chosen]
        peak = statistics.median(run["peak"] for run in chosen)
        steady = [run["steady"] for run in chosen if "steady" in run]
        lines.append(f"{build:8} {kind:8} {len(chosen):>4} {statistics.median(seconds):>9.2f} {min(seconds):>8.2f} {max(seconds):>8.2f} "
                     f"{peak:>10.0f}" + (f" {statistics.median(steady):>12.0f}" if steady else ""))
    lines.append("")
    for one in bars:
        word = "at least" if one["atLeast"] else "at most"
        verdict = "holds" if one["holds"] else "DOES NOT HOLD"
        figure = "none" if one["figure"] is None else f"{one['figure']:.3f}"
        lines.append(f"{one['name']:45} {figure:>9} {one['unit']:2} {word} {one['bar']:.3f}: {verdict}")
    return "\n".join(lines)


def save(runs_done, bars, log_info, table, takeovers, options):
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {"cpu": cpu, "cpus": os.cpu_count(), "kernel": os.uname().release, "commit": commit,
             "options": {name: value for name, value in vars(options).items() if name not in ("out", "beside", "keep", "folder")}}
    document = {"about": about, "log": log_info, "bars": bars, "lives": runs_done, "takeovers": takeovers}
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "table.txt").write_text(table + "\n")


@contextlib.contextmanager
def killing_all():
    """Leaves no server behind, even on errors."""
    try:
        yield
    finally:
        for process in Server.started:
            if process.poll() is None:
                process.kill()
                process.wait()


def check_space(folder, options):
    """For the log, unless it is kept from an earlier run, and a copy."""
    copies = 1 if options.keep and (options.keep / "generated.json").exists() else 2
    wanted = copies * options.events * EVENT_BYTES
    free = shutil.disk_usage(folder).free
    if free < wanted:
        sys.exit(f"{folder} has {free / 1e9:.0f} GB free, and {wanted / 1e9:.0f} GB are needed: use another folder with --folder, or fewer --events")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--endpoints", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="starts of each kind")
    parser.add_argument("--beside", metavar="PATH", help="another build of penstock")
    parser.add_argument("--beside-runs", type=int, default=2, help="later starts of the other build, which may take minutes each; with 0 its first one stands for all (as every start did before snapshots)")
    parser.add_argument("--settle", type=float, default=10, help="seconds from ready to steady")
    parser.add_argument("--timeout", type=float, default=1800, help="maximum seconds per start")
    parser.add_argument("--takeover-events", type=int, default=200_000, help="in the store that two autoscalers share")
    parser.add_argument("--only", choices=["start", "takeover"], help="run only this half")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the generated log here, and reuse it the next time")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="folder for everything else")
    parser.add_argument("--out", default=str(HERE / "results"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    binary, generator = build()
    beside = str(Path(options.beside).resolve(strict=True)) if options.beside else None
    runs_done, bars, takeovers, log_info = [], [], [], None
    with tempfile.TemporaryDirectory(prefix="penstock-start-", dir=options.folder) as folder, killing_all():
        bench = Bench(options, Path(folder))
        if options.only != "takeover":
            check_space(options.folder, options)
            kept = options.keep or bench.folder / "kept"
            kept.mkdir(parents=True, exist_ok=True)
            log_info = generate(generator, kept, options)
            template = kept / "data"
            if not (kept / "generated.json").exists():
                name, earlier_binary = ("beside", beside) if beside else ("this", binary)
                run_earlier_release(bench, name, earlier_binary, template)
                (kept / "generated.json").write_text(json.dumps(log_info) + "\n")
            print("starts:", flush=True)
            if beside:
                bench.starts("beside", beside, template, options.beside_runs)
            bench.starts("this", binary, template, options.runs)
            runs_done = bench.runs_done
            bars += check_bars(runs_done, beside)
        if options.only != "start":
            takeovers = takeover.measure(binary, generator, bench.folder, options)
            bars += takeover.check_bars(takeovers)
        table = show(runs_done, bars, log_info)
        print("\n" + table)
        save(runs_done, bars, log_info, table, takeovers, options)
    sys.exit(0 if all(one["holds"] for one in bars) else 1)


if __name__ == "__main__":
    main()
