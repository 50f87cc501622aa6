#!/usr/bin/env bash
# Lists unused dependencies with cargo-machete. Uses the one on PATH, or builds one
# under target/tools (a minute or two, once).
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.9.2
tools=target/tools
machete=$(command -v cargo-machete || true)
if [ -z "$machete" ]; then
  machete=$tools/bin/cargo-machete
  if [ ! -x "$machete" ]; then
    echo "unused: building cargo-machete $version into $tools (a minute or two, once)" >&2
    cargo install cargo-machete --quiet --locked --version "=$version" --root "$tools"
  fi
fi
exec "$machete" --skip-target-dir
