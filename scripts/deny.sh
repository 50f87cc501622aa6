#!/usr/bin/env bash
# Runs cargo-deny with the given arguments and the rules in deny.toml. Uses the one on PATH, or builds one under
# target/tools (some minutes, once).
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.20.2
tools=target/tools
deny=$(command -v cargo-deny || true)
if [ -z "$deny" ]; then
  deny=$tools/bin/cargo-deny
  if [ ! -x "$deny" ]; then
    echo "deny: building cargo-deny $version into $tools (some minutes, once)" >&2
    cargo install cargo-deny --quiet --locked --version "=$version" --root "$tools"
  fi
fi
exec "$deny" --locked check "$@"
