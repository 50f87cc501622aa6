#!/usr/bin/env bash
# Installs missing prerequisites for building Penstock, and reports what it does.
# Changes and prints nothing if nothing is missing; idempotent.
#
#   scripts/setup.sh           a Rust toolchain and a C compiler
#   scripts/setup.sh check     also rustfmt and clippy
#   scripts/setup.sh kafka     also headers for building the Kafka client
#   scripts/setup.sh stack     also the servers for tests of the full stack
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
steps=" $* "
wants() { [[ "$steps" == *" $1 "* ]]; }
skips() { [[ ",${PENSTOCK_SKIP:-}," == *",$1,"* ]]; }

# Runs a command as root: directly, or with sudo.
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
  # Failures are usually due to a stale package list: refresh it and retry once.
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 ||
    {
      as_root apt-get update -qq >&2
      as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
    }
}

# SQLite is compiled from source and linked in: that needs a C compiler and the C library's headers.
packages=()
have cc || packages+=(gcc libc6-dev)
have make || packages+=(make)
have pkg-config || packages+=(pkg-config)
# The Kafka client is compiled from source too, against the system's OpenSSL.
if wants kafka || wants stack; then
  pkg-config --exists libssl 2>/dev/null || packages+=(libssl-dev)
  pkg-config --exists zlib 2>/dev/null || packages+=(zlib1g-dev)
fi
# Servers for tests, except those named in PENSTOCK_SKIP.
if wants stack && ! skips kafka; then
  have java || packages+=(openjdk-17-jre-headless)
  have mvn || packages+=(maven)
fi
if wants stack && ! skips python; then
  python3 -c 'import venv, ensurepip' 2>/dev/null || packages+=(python3 python3-venv)
fi
if [ "${#packages[@]}" -gt 0 ]; then
  if have apt-get; then
    apt_install "${packages[@]}"
  else
    fail "missing: ${packages[*]}. Install them with your package manager, e.g.
    Fedora: dnf install gcc make pkgconf    Arch: pacman -S base-devel    Alpine: apk add build-base pkgconf"
  fi
fi

# The minimum version of the workspace (`rust-version` in Cargo.toml).
wanted=$(sed -n 's/^rust-version = "\([0-9.]*\)"$/\1/p' Cargo.toml)
how_to="Install Rust $wanted or newer with rustup (https://rustup.rs), then run this again:
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal -c clippy -c rustfmt"

export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
# apt-cache also knows packages that are only referenced by others and cannot be installed.
in_distribution() { have apt-get && LC_ALL=C apt-cache policy "$1" 2>/dev/null | grep -q '^ *Candidate: [0-9]'; }
# Rustup's installer, verified against its published checksum: https://rust-lang.github.io/rustup/installation/other.html
install_rustup() {
  local libc=gnu scratch url status=0
  ls /lib/ld-musl-* >/dev/null 2>&1 && libc=musl
  url=https://static.rust-lang.org/rustup/dist/$(uname -m)-unknown-linux-$libc/rustup-init
  scratch=$(mktemp -d)
  say "installing rustup into ${CARGO_HOME:-$HOME/.cargo} ($url)"
  (
    cd "$scratch"
    curl --proto '=https' --tlsv1.2 -sSf -o rustup-init "$url" &&
      sum=$(curl --proto '=https' --tlsv1.2 -sSf "$url.sha256" | cut -c -64) &&
      printf '%s  rustup-init\n' "$sum" | sha256sum --check --quiet >&2 &&
      chmod +x rustup-init &&
      ./rustup-init -y --quiet --profile minimal --default-toolchain none --no-modify-path >&2
  ) || status=1
  rm -rf "$scratch"
  return "$status"
}
if ! have cargo && ! have rustup; then
  if in_distribution rustup; then
    apt_install rustup
  else
    # Both rustup and cargo download over https.
    have curl || ! have apt-get || apt_install curl ca-certificates
    have curl || fail "there is neither cargo nor curl. $how_to"
    install_rustup || fail "rustup could not be installed. $how_to"
  fi
fi
if have rustup && ! cargo --version >/dev/null 2>&1; then
  say "installing the stable Rust toolchain (rustup)"
  rustup toolchain install stable --profile minimal >&2
  rustup default stable >&2
fi
have cargo || fail "there is no cargo. $how_to"

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

if wants stack; then
  missing=()
  # Also if the user provides a server: tests that kill one or fill its disk start their own.
  if ! skips postgres; then
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || have postgres || missing+=(postgresql-15)
  fi
  if [ "${#missing[@]}" -gt 0 ]; then
    have apt-get || fail "missing: ${missing[*]}. Install PostgreSQL 15 or newer with your package manager, or skip its tests with PENSTOCK_SKIP=postgres."
    # Keep the package from creating and starting a cluster: the tests start their own servers.
    as_root mkdir -p /etc/postgresql-common/createcluster.d
    echo 'create_main_cluster = false' | as_root tee /etc/postgresql-common/createcluster.d/penstock.conf >/dev/null
    apt_install "${missing[@]}"
  fi
fi
