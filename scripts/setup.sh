#!/usr/bin/env bash
# Makes sure that what a build of Penstock needs is there, and says what it does about what is not.
# Changes nothing and prints nothing when nothing is missing; safe to run again and again.
#
#   scripts/setup.sh           a Rust toolchain and a C compiler
#   scripts/setup.sh check     the same, and rustfmt and clippy
#   scripts/setup.sh kafka     the same, and headers for building the Kafka client
#   scripts/setup.sh stack     the same, and real servers: Java and Maven for Kafka
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
steps=" $* "
wants() { [[ "$steps" == *" $1 "* ]]; }
skips() { [[ ",${PENSTOCK_SKIP:-}," == *",$1,"* ]]; }

# Runs a command as root: directly, or through sudo where there is one.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif have sudo; then
    sudo "$@"
  else
    fail "this needs root, and there is no sudo. As root, run: $*"
  fi
}

apt_install() {
  say "installing $* (apt-get)"
  # A stale package list is the usual reason for a failure: refresh it once, then try again.
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 ||
    {
      as_root apt-get update -qq >&2
      as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
    }
}

# SQLite is compiled from source (C) and linked in: that takes a C compiler with the C library's headers.
packages=()
have cc || packages+=(gcc libc6-dev)
have make || packages+=(make)
have pkg-config || packages+=(pkg-config)
# The Kafka client is compiled from source too, against the system's OpenSSL.
if wants kafka || wants stack; then
  pkg-config --exists libssl 2>/dev/null || packages+=(libssl-dev)
  pkg-config --exists zlib 2>/dev/null || packages+=(zlib1g-dev)
fi
# Servers for tests; who does without names them in PENSTOCK_SKIP.
if wants stack && ! skips kafka; then
  have java || packages+=(openjdk-17-jre-headless)
  have mvn || packages+=(maven)
fi
if [ "${#packages[@]}" -gt 0 ]; then
  if have apt-get; then
    apt_install "${packages[@]}"
  else
    fail "missing: ${packages[*]}. Install them with your package manager, e.g.
    Fedora: dnf install gcc make pkgconf    Arch: pacman -S base-devel    Alpine: apk add build-base pkgconf"
  fi
fi

# The version that the workspace asks for (`rust-version` in Cargo.toml).
wanted=$(sed -n 's/^rust-version = "\([0-9.]*\)"$/\1/p' Cargo.toml)
how_to="Install Rust $wanted or newer with rustup (https://rustup.rs), then run this again:
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal -c clippy -c rustfmt"

export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
if ! have cargo && ! have rustup && have apt-get && apt-cache show rustup >/dev/null 2>&1; then
  apt_install rustup
fi
if have rustup && ! cargo --version >/dev/null 2>&1; then
  say "installing the stable Rust toolchain (rustup)"
  rustup toolchain install stable --profile minimal >&2
  rustup default stable >&2
fi
have cargo || fail "there is no cargo, and this distribution has no rustup package. $how_to"

found=$(rustc --version | sed 's/^rustc \([0-9]*\.[0-9]*\).*/\1/')
oldest=$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -1)
if [ "$oldest" != "$wanted" ]; then
  fail "rustc is $found, and Penstock needs $wanted or newer. With rustup: rustup update stable. Otherwise:
$how_to"
fi

if wants check; then
  for tool in fmt clippy; do
    cargo "$tool" --version >/dev/null 2>&1 && continue
    component=${tool/fmt/rustfmt}
    have rustup || fail "cargo $tool is missing. Install the component $component of your Rust $found."
    say "installing $component (rustup)"
    rustup component add "$component" >&2
  done
fi
