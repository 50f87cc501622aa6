#!/usr/bin/env python3
"""Serves real model servers with Penstock, each with its own client, and reports what holds for each of them.

    run.py [--penstock PATH] [--only NAME,…] [--update-readme] [--keep FOLDER] [--list]

Servers and clients are installed once into $XDG_CACHE_HOME/penstock/servers. A row whose packages cannot be had is skipped
by name. Exit code 1 if a row fails.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import rows
import table
from environments import Environment, Missing, say
from penstock import Failed, Penstock
from steps import STEPS, Test

REPOSITORY = Path(__file__).resolve().parents[2]


class Result:
    """What came out of a row: an outcome per step (None if not reached), or why it was skipped."""

    def __init__(self, row):
        self.row = row
        self.outcomes = [None] * len(STEPS)
        self.problems = []
        self.skipped = None

    def passed(self):
        return self.skipped is None and all(self.outcomes)

    def cells(self, server, client):
        return table.cells(self.row, versions(server), versions(client), self.outcomes)


def versions(environment):
    return ", ".join(pin.replace("==", " ") for pin in environment.pins() if "==" in pin)


def install(row):
    """The environments of the server and of its client. Raises `Missing`."""
    if row.needs and not shutil.which(row.needs):
        raise Missing(f"it needs the program {row.needs}, which is not on PATH")
    environments = Environment(row.environment), Environment(f"client-{row.client}")
    for environment in environments:
        environment.install()
    return environments


def run_row(result, server, client, arguments):
    row = result.row
    penstock = Penstock(arguments.penstock, row.model(), server.path())
    try:
        if row.prepare:
            command = [str(server.bin / "python"), row.prepare]
            done = subprocess.run(
                command, cwd=penstock.work, env=penstock.environment, capture_output=True, text=True, timeout=600
            )
            if done.returncode != 0:
                raise Failed(f"{row.prepare}: {done.stderr.strip().splitlines()[-1:]}")
        penstock.start()
        test = Test(row, penstock, client)
        for index, (name, step) in enumerate(STEPS):
            begin = time.monotonic()
            try:
                remark = step(test)
                result.outcomes[index] = True
            except Failed as failed:
                remark = str(failed)
                result.outcomes[index] = False
                result.problems.append(f"{name}: {failed}")
            word = "ok" if result.outcomes[index] else "FAILED"
            say(f"{row.name}: {name}: {word}, {time.monotonic() - begin:.0f} s{f': {remark}' if remark else ''}")
            if index == 0 and not result.outcomes[0]:
                # Without it there is nothing to try.
                say(f"{row.name}: the server's log ends: {penstock.last_lines(12)}")
                return
    except Failed as failed:
        result.outcomes[0] = False
        result.problems.append(f"start: {failed}")
        say(f"{row.name}: start: FAILED: {failed}")
    finally:
        keep = arguments.keep and Path(arguments.keep) / row.name
        penstock.destroy(keep if keep and not result.passed() else None)


def report(results):
    """Prints the outcome of every row; true if none failed."""
    width = max(len(result.row.name) for result in results)
    names = [name for name, _ in STEPS]
    print(f"\n{'':{width}}  {'  '.join(names)}")
    for result in results:
        if result.skipped:
            print(f"{result.row.name:{width}}  skipped: {result.skipped}")
            continue
        words = {True: "ok", False: "FAILED", None: "-"}
        cells = (f"{words[outcome]:{len(name)}}" for outcome, name in zip(result.outcomes, names, strict=True))
        print(f"{result.row.name:{width}}  {'  '.join(cells)}")
    failed = [result for result in results if not result.skipped and not result.passed()]
    for result in failed:
        for problem in result.problems:
            print(f"\n{result.row.name}: {problem}")
    skipped = sum(result.skipped is not None for result in results)
    print(f"\n{len(results) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped")
    return not failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--penstock", default=REPOSITORY / "target/release/penstock", type=Path)
    parser.add_argument("--only", metavar="NAME,…", help="these rows alone")
    parser.add_argument("--update-readme", action="store_true", help="write the table in README.md")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the files of rows that fail, in FOLDER/NAME")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    arguments = parser.parse_args()
    names = [row.name for row in rows.ALL]
    if arguments.list:
        print("\n".join(names))
        return 0
    wanted = arguments.only.split(",") if arguments.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    if not os.access(arguments.penstock, os.X_OK):
        parser.error(f"{arguments.penstock} is not there; build it with `cargo build --release --bin penstock`")
    arguments.penstock = arguments.penstock.resolve()
    # So that an interrupt, of either kind, ends all processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    results, lines = [], {}
    for row in (row for row in rows.ALL if row.name in wanted):
        result = Result(row)
        results.append(result)
        try:
            server, client = install(row)
        except Missing as missing:
            result.skipped = str(missing)
            say(f"{row.name}: skipped: {missing}")
            continue
        run_row(result, server, client, arguments)
        cells = result.cells(server, client)
        lines[cells[0]] = table.line(cells)
    good = report(results)

    if arguments.update_readme:
        table.update(lines, rows.ALL, date.today().isoformat())
    elif any(table.in_readme().get(title) != text for title, text in lines.items()):
        print("The table in README.md differs from this; --update-readme writes it.")
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
