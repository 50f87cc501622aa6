"""Writes the model archive `sum.mar`."""

import subprocess

subprocess.run(
    ["torch-model-archiver", "--model-name", "sum", "--version", "1", "--handler", "handler.py", "--export-path", "."],
    check=True,
)
