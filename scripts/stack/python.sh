#!/usr/bin/env bash
# Python packages for tests, separate from the system's.
#
#   python.sh with PACKAGE==VERSION [...]        prints an interpreter that has them; downloads them with pip the first time
set -euo pipefail

fail() {
  echo "python: $*" >&2
  exit 1
}

[ "${1:-}" = with ] && [ $# -gt 1 ] || fail "usage: python.sh with PACKAGE==VERSION [...]"
shift
command -v python3 >/dev/null ||
  fail "there is no python3, which tests of real model servers need. Run scripts/setup.sh stack, or install it." \
    "To do without, name python in PENSTOCK_SKIP"

# One folder per combination of Python and packages.
name=$( (python3 --version && printf '%s\n' "$@") | sha256sum | cut -c -16)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/penstock/python-$name
if [ ! -d "$folder" ]; then
  mkdir -p "${folder%/*}"
  # Several test programs may need them concurrently: one downloads, the others wait.
  exec 9>"$folder.lock"
  flock 9
  if [ ! -d "$folder" ]; then
    echo "python: downloading $* into $folder (once)" >&2
    rm -rf "$folder.partial"
    python3 -m venv "$folder.partial" >&2 ||
      fail "python3 cannot create an environment; install its venv module (Debian: python3-venv)"
    "$folder.partial/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2 ||
      fail "pip could not download $*, see above. To skip these tests, set PENSTOCK_SKIP=python"
    mv "$folder.partial" "$folder"
  fi
  exec 9>&-
fi
echo "$folder/bin/python"
