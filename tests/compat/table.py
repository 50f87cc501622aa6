"""The compatibility table in README.md: between two marks, a line per server."""

import re
from pathlib import Path

from steps import STEPS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- make test-servers: begin -->", "<!-- make test-servers: end -->"
HEAD = ["server", "versions", "used by", *(name for name, _ in STEPS)]


def line(cells):
    return f"| {' | '.join(cells)} |"


def cells(row, versions, client, outcomes):
    """The cells of a row; `outcomes` has True, False or None (not reached) for each step."""
    words = {True: "yes", False: "**no**", None: "–"}
    found = [words[outcome] for outcome in outcomes]
    if row.lost_as != 502:
        index = [name for name, _ in STEPS].index("worker killed")
        found[index] += f", as {row.lost_as}"
    return [title(row), versions, client, *found]


def title(row):
    return f"[{row.title}](tests/compat/rows/{row.name}/document.yaml)"


def in_readme():
    """The lines of the rows in README.md, by title."""
    found = re.search(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", README.read_text(), re.DOTALL)
    if not found:
        raise SystemExit(f"README.md has no line {BEGIN}, or no line {END} after it")
    lines = [text for text in found[1].splitlines() if text.startswith("| [")]
    return {text.split(" | ")[0].removeprefix("| "): text for text in lines}


def update(lines, rows, date):
    """Writes these lines, by title, in the order of the rows; those that were not run keep theirs."""
    order = [title(row) for row in rows]
    kept = {name: text for name, text in in_readme().items() if name in order}
    kept |= lines
    body = [
        f"Run on {date} by `make test-servers`:",
        "",
        line(HEAD),
        line(["---"] * len(HEAD)),
        *(kept[name] for name in order if name in kept),
        "",
        *(f"- {row.title}: {row.note}" for row in rows if row.note and title(row) in kept),
    ]
    text = README.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN) + 1, text.index(END)
    README.write_text(text[:begin] + "\n".join(body) + "\n" + text[end:])
