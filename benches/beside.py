#!/usr/bin/env python3
"""Compares a bench of two builds, in alternate rounds of one run.

Both commands run once per round, the other way round every second time, and each figure is found in what
they print. A figure fails if this build is worse by more than the bar at the lower end of the 95 % interval
of the median ratio (bootstrap): noise alone does not fail it, and more rounds narrow the interval.

    cargo bench -p penstock-domain --bench evaluate --no-run      in this worktree, and in one of the other build
    benches/beside.py --ours OURS/evaluate-HASH --theirs THEIRS/evaluate-HASH \\
        --figure 'evaluations=([\\d.]+) million rule evaluations' --more-is-better
"""

import argparse
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def run(command, figures):
    """The figures that a command prints."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(shlex.split(command), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              env={**os.environ, "OUT": str(Path(folder) / "results")})
    printed = done.stdout + done.stderr
    values = {}
    for name, pattern in figures.items():
        found = re.search(pattern, printed)
        if not found:
            sys.exit(f"`{command}` ended with {done.returncode} and printed nothing that matches `{pattern}`:\n{printed[-2000:]}")
        values[name] = float(found.group(1).replace(",", ""))
    return values


def interval(values, draws=10_000):
    generator = random.Random(1)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(draws * 0.025)], medians[int(draws * 0.975)]


def figure(text):
    name, _, pattern = text.partition("=")
    if not pattern or re.compile(pattern).groups != 1:
        raise argparse.ArgumentTypeError("write NAME=REGEX with one group, which is the number")
    return name, pattern


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, metavar="COMMAND", help="the bench of this build")
    parser.add_argument("--theirs", required=True, metavar="COMMAND", help="the same of the other build")
    parser.add_argument("--figure", required=True, action="append", type=figure, metavar="NAME=REGEX")
    parser.add_argument("--more-is-better", action="store_true", help="the figures are rates")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bar", type=float, default=1.05, help="how many times worse is still good enough")
    parser.add_argument("--out", metavar="FILE", help="keep the raw figures here, as JSON")
    options = parser.parse_args()
    figures = dict(options.figure)
    rounds = []
    for number in range(options.rounds):
        order = [("ours", options.ours), ("theirs", options.theirs)]
        values = {name: run(command, figures) for name, command in (order if number % 2 == 0 else reversed(order))}
        rounds.append(values)
        print(f"round {number + 1} of {options.rounds}: {json.dumps(values)}", flush=True)
    holds = True
    for name in figures:
        ratios = [r["theirs"][name] / r["ours"][name] if options.more_is_better else r["ours"][name] / r["theirs"][name]
                  for r in rounds]
        low, high = interval(ratios)
        good = low <= options.bar
        holds = holds and good
        print(f"{name}: {statistics.median(ratios):.3f} times as much as the other build [{low:.3f}, {high:.3f}], "
              f"at most {options.bar:.2f}: {'holds' if good else 'DOES NOT HOLD'}")
    if options.out:
        about = {"cpus": os.cpu_count(), "kernel": os.uname().release, "options": {**vars(options), "figure": figures}}
        Path(options.out).write_text(json.dumps({"about": about, "rounds": rounds}, indent=1) + "\n")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
