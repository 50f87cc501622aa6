#!/usr/bin/env python3
"""How long `penstock serve` takes to start on a long log, this build beside another in one run.

A log of EVENTS events over ENDPOINTS endpoints is generated (generate/main.rs says what is in it), and
served once and stopped by the other build (or this one), as an earlier release would have left it: read
models, history, the gateway's saved routes, a token; no snapshots. Each build gets a copy of that folder and
starts on it again and again, alone on the machine:

  first    the first start of a new release: everything is folded from the log
  second   after SIGTERM
  killed   after SIGKILL some seconds after it was ready, and once more before it was ready again
  resumed  after SIGKILL at a random moment of a first start (this build only)

Measured from the start of the process: until /readyz answers 200; the most memory until then (VmHWM), and
what it has some seconds later (VmRSS); when the gateway first answers for an endpoint of the saved routes,
and whether it went on; what /readyz says meanwhile. The files are in the page cache as far as they fit.

With --beside PATH (a `penstock` binary of before) ratios are judged too. Then two autoscalers share a store
on PostgreSQL and Kafka, and one is killed: takeover.py.

It fails if a bar is missed, and names each with its figure.

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
# An endpoint that lets anybody in; see generate/endpoint.rs.
PROBED = "e-00000"
POLL = 0.005
SAY_AGAIN = 0.25
# Bytes on disk of one event with its rows, with room for what is written while it is served.
EVENT_BYTES = 4500
# A fold that is over sooner need not show how far it is.
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
    """One life of `penstock serve`."""

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

    def must_live(self):
        if self.process.poll() is not None:
            fail(self.log.name, f"penstock ended with {self.process.returncode}")

    def until_ready(self, timeout):
        """Seconds until it was ready, and what it waited for meanwhile: [[second, sentences], ...]."""
        told = []
        while True:
            self.must_live()
            answer = ask(self.control, "GET", "/readyz")
            at = self.since()
            if answer and answer[0] == 200:
                return at, told
            if answer and answer[0] == 503:
                missing = json.loads(answer[2])["missing"]
                if not told or is_news(told[-1], at, missing):
                    told.append([round(at, 3), missing])
            if at > timeout:
                fail(self.log.name, f"not ready after {timeout} s; it waits for {told[-1:]}")
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


def is_news(last, at, missing):
    """Something else is missing, or it is a while since it was last said how far what is missing has come."""
    who = lambda sentences: [sentence.split(":")[0] for sentence in sentences]
    return who(last[1]) != who(missing) or last[1] != missing and at - last[0] >= SAY_AGAIN


class Probe(threading.Thread):
    """Asks the gateway for an endpoint again and again. Nothing listens behind simulated instances, so an
    answer that names an instance or its absence shows that the route is known; 404 that it is not."""

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
        self.lives = []

    def live(self, build, binary, folder, kind, steady):
        """Starts it and waits until it is ready; with `steady`, some seconds more. The server goes on."""
        server = Server(binary, folder, self.folder / f"{build}.log")
        probe = Probe(server)
        probe.start()
        seconds, told = server.until_ready(self.options.timeout)
        life = {"build": build, "kind": kind, "seconds": seconds, "peak": server.memory("VmHWM"),
                "gateway": probe.end(), "missing": told}
        if steady:
            time.sleep(self.options.settle)
            server.must_live()
            life["steady"] = server.memory("VmRSS")
        self.lives.append(life)
        memory = f", {life['peak']:.0f} MiB at most" + (f", {life['steady']:.0f} MiB then" if steady else "")
        print(f"  {build:7} {kind:8} {seconds:8.2f} s{memory}", flush=True)
        return server, seconds

    def starts(self, build, binary, template, runs):
        folder = self.folder / build
        copy(template, folder)
        server, first = self.live(build, binary, folder, "first", True)
        for kind in ["second"] * runs + ["killed"] * runs:
            if kind == "second":
                server.end(signal.SIGTERM)
            else:
                self.kill(server, binary, folder)
            server, _ = self.live(build, binary, folder, kind, kind == "second")
        server.end(signal.SIGTERM)
        if build == "this":
            self.interrupted(binary, folder, first, runs)
        shutil.rmtree(folder)

    def kill(self, server, binary, folder):
        """Some time after it was ready; and the next life before it is ready, if that does not take too long."""
        time.sleep(self.rng.uniform(0, self.options.settle))
        server.end(signal.SIGKILL)
        if self.lives[-1]["seconds"] < self.options.settle:
            server = Server(binary, folder, server.log.name)
            time.sleep(self.rng.uniform(0, self.lives[-1]["seconds"]))
            server.must_live()
            server.end(signal.SIGKILL)

    def interrupted(self, binary, folder, first, runs):
        for _ in range(runs):
            forget_snapshots(folder)
            server = Server(binary, folder, self.folder / "this.log")
            time.sleep(self.rng.uniform(0.05, 0.95) * first)
            server.must_live()
            server.end(signal.SIGKILL)
            server, _ = self.live("this", binary, folder, "resumed", False)
            server.end(signal.SIGTERM)


def copy(template, folder):
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["cp", "-r", "--reflink=auto", str(template), str(folder)], check=True)


def forget_snapshots(folder):
    """What is left is as before the first start with snapshots: they hold nothing that the log does not."""
    with sqlite3.connect(folder / "penstock.db") as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE name IN ('snapshots', 'snapshot_parts')").fetchall():
            db.execute(f"DELETE FROM {table}")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def generate(generator, folder, options):
    """The log, or that of an earlier run."""
    wanted = {name: getattr(options, name) for name in ("events", "endpoints", "seed")}
    known = folder / "generated.json"
    if known.exists():
        told = json.loads(known.read_text())
        if told["wanted"] == wanted:
            return told
        sys.exit(f"{folder} holds a log of {told['wanted']}; name another folder with --keep")
    command = [generator, "--data", str(folder / "data")]
    for name, value in wanted.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"wanted": wanted, **json.loads(done.stdout)}


def leave_behind(bench, build, binary, template):
    """A life of an earlier release, from the generated log to a clean stop with the routes saved."""
    print("an earlier run:", flush=True)
    server, _ = bench.live(build, binary, template, "earlier", False)
    routes = template / "gateway-routes.json"
    deadline = time.monotonic() + 120
    while not (routes.exists() and PROBED in routes.read_text()):
        server.must_live()
        if time.monotonic() > deadline:
            fail(server.log.name, "the gateway has saved no routes")
        time.sleep(0.2)
    # Instances begin anew with every start; let them.
    time.sleep(bench.options.settle)
    server.end(signal.SIGTERM)
    forget_snapshots(template)


def of(lives, build, kind, measure):
    values = [measure(life) for life in lives if (life["build"], life["kind"]) == (build, kind)]
    return statistics.median(values) if values else None


def progress_shown(life):
    """How often a number changed in what /readyz said."""
    numbers = [re.findall(r"\d+", " ".join(missing)) for _, missing in life["missing"]]
    return sum(1 for before, after in zip(numbers, numbers[1:]) if after and before != after)


def judge(lives, beside):
    seconds = lambda life: life["seconds"]
    kinds = ["first", "second", "killed", "resumed"]
    ours = {kind: of(lives, "this", kind, seconds) for kind in kinds}
    bars = [bar(f"ready, {kind} start", ours[kind], READY_MAX, "s") for kind in ("second", "killed")]
    if beside:
        theirs = {kind: of(lives, "beside", kind, seconds) for kind in kinds}
        ratio = lambda kind, other: ours[kind] / theirs[other]
        bars += [bar(f"{kind} start, of that beside", ratio(kind, other), most, "")
                 for kind, other, most in [("second", "second", SECOND_RATIO_MAX), ("killed", "killed", SECOND_RATIO_MAX),
                                           ("first", "first", FIRST_RATIO_MAX), ("resumed", "first", FIRST_RATIO_MAX)]]
    steady = statistics.median(life["steady"] for life in lives if life["build"] == "this" and "steady" in life)
    for kind in kinds:
        peak = of(lives, "this", kind, lambda life: life["peak"])
        bars.append(bar(f"peak memory, {kind} start, of steady", peak / steady, MEMORY_RATIO_MAX, ""))
    first = next(life for life in lives if (life["build"], life["kind"]) == ("this", "first"))
    gateway = first["gateway"]
    bars.append(bar("gateway serves, first start", gateway["firstAnswer"], min(READY_MAX, first["seconds"]), "s"))
    bars.append(bar("gateway silent meanwhile, at most", gateway["longestGap"], READY_MAX, "s"))
    if first["seconds"] >= PROGRESS_FROM:
        bars.append(bar("progress of the first start, told so often", progress_shown(first), 2, "", at_least=True))
    return bars


def show(lives, bars, told):
    lines = []
    if lives:
        lines += [f"{told['events']:,} events, {told['endpoints']:,} endpoints, seed {told['seed']}", "",
                  f"{'build':8} {'start':8} {'runs':>4} {'ready, s':>9} {'least':>8} {'most':>8} {'peak, MiB':>10} {'steady, MiB':>12}"]
    for build, kind in dict.fromkeys((life["build"], life["kind"]) for life in lives):
        chosen = [life for life in lives if (life["build"], life["kind"]) == (build, kind)]
        seconds = [life["seconds"] for life in chosen]
        peak = statistics.median(life["peak"] for life in chosen)
        steady = [life["steady"] for life in chosen if "steady" in life]
        lines.append(f"{build:8} {kind:8} {len(chosen):>4} {statistics.median(seconds):>9.2f} {min(seconds):>8.2f} {max(seconds):>8.2f} "
                     f"{peak:>10.0f}" + (f" {statistics.median(steady):>12.0f}" if steady else ""))
    lines.append("")
    for one in bars:
        word = "at least" if one["atLeast"] else "at most"
        verdict = "holds" if one["holds"] else "DOES NOT HOLD"
        figure = "none" if one["figure"] is None else f"{one['figure']:.3f}"
        lines.append(f"{one['name']:45} {figure:>9} {one['unit']:2} {word} {one['bar']:.3f}: {verdict}")
    return "\n".join(lines)


def save(lives, bars, told, table, takeovers, options):
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {"cpu": cpu, "cpus": os.cpu_count(), "kernel": os.uname().release, "commit": commit,
             "options": {name: value for name, value in vars(options).items() if name not in ("out", "beside", "keep", "folder")}}
    document = {"about": about, "log": told, "bars": bars, "lives": lives, "takeovers": takeovers}
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "table.txt").write_text(table + "\n")


@contextlib.contextmanager
def ending_all():
    """Whatever happens, no server stays behind."""
    try:
        yield
    finally:
        for process in Server.started:
            if process.poll() is None:
                process.kill()
                process.wait()


def room_for(folder, options):
    wanted = 2 * options.events * EVENT_BYTES
    free = shutil.disk_usage(folder).free
    if free < wanted:
        sys.exit(f"{folder} has {free / 1e9:.0f} GB free, and {wanted / 1e9:.0f} GB are needed: name another folder with --folder, or fewer --events")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--endpoints", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="starts of each kind")
    parser.add_argument("--beside", metavar="PATH", help="another build of penstock")
    parser.add_argument("--beside-runs", type=int, default=2, help="the same of the other build, which may take minutes each")
    parser.add_argument("--settle", type=float, default=10, help="seconds from ready to steady")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that a start may take")
    parser.add_argument("--takeover-events", type=int, default=200_000, help="in the store that two autoscalers share")
    parser.add_argument("--only", choices=["start", "takeover"], help="half of it")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the generated log here, and take it from here the next time")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where everything else is made")
    parser.add_argument("--out", default=str(HERE / "results"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    binary, generator = build()
    beside = str(Path(options.beside).resolve(strict=True)) if options.beside else None
    lives, bars, takeovers, told = [], [], [], None
    with tempfile.TemporaryDirectory(prefix="penstock-start-", dir=options.folder) as folder, ending_all():
        bench = Bench(options, Path(folder))
        if options.only != "takeover":
            room_for(options.folder, options)
            kept = options.keep or bench.folder / "kept"
            kept.mkdir(parents=True, exist_ok=True)
            told = generate(generator, kept, options)
            template = kept / "data"
            if not (kept / "generated.json").exists():
                name, of_before = ("beside", beside) if beside else ("this", binary)
                leave_behind(bench, name, of_before, template)
                (kept / "generated.json").write_text(json.dumps(told) + "\n")
            print("starts:", flush=True)
            if beside:
                bench.starts("beside", beside, template, options.beside_runs)
            bench.starts("this", binary, template, options.runs)
            lives = bench.lives
            bars += judge(lives, beside)
        if options.only != "start":
            takeovers = takeover.measure(binary, generator, bench.folder, options)
            bars += takeover.judge(takeovers)
        table = show(lives, bars, told)
        print("\n" + table)
        save(lives, bars, told, table, takeovers, options)
    sys.exit(0 if all(one["holds"] for one in bars) else 1)


if __name__ == "__main__":
    main()
