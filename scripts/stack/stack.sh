#!/usr/bin/env bash
# A real PostgreSQL and a real Apache Kafka on free loopback ports, in .stack/, without containers.
#
#   stack.sh up        starts what is not running, waits until it answers, writes .stack/env
#   stack.sh down      stops what `up` started and removes .stack/
#   stack.sh status    shows what is running; fails if something is missing
#
# BROKERS=3 starts three brokers (three replicas, two of which must confirm). A server named by PENSTOCK_STORE
# (postgres://…) or PENSTOCK_BUS (kafka://…) is used instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

tools=$PWD/scripts/stack
stack=$PWD/.stack
patience=60

say() { echo "stack: $*"; }
fail() {
  echo "stack: $*" >&2
  exit 1
}

# The process id in FOLDER/pid, if that is still the process we started.
pid_of() {
  local pid
  pid=$(cat "$1/pid" 2>/dev/null) || return 1
  tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q -e "$1" -e "${2:-$1}" || return 1
  echo "$pid"
}

# N free ports.
free_ports() {
  local found=() port
  while [ "${#found[@]}" -lt "$1" ]; do
    port=$((20000 + RANDOM % 12000))
    [[ " ${found[*]-} " != *" $port "* ]] || continue
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || found+=("$port")
  done
  echo "${found[@]}"
}

# Starts a server that outlives this script: FOLDER, then the command.
start() {
  local folder=$1
  shift
  setsid "$@" </dev/null >"$folder/out.log" 2>&1 &
  echo $! >"$folder/pid"
}

# Waits for a server: FOLDER, name, then the command to retry.
wait_for() {
  local folder=$1 name=$2
  shift 2
  for _ in $(seq $((patience * 5))); do
    "$@" && return
    kill -0 "$(cat "$folder/pid")" 2>/dev/null || break
    sleep 0.2
  done
  tail -n 5 "$folder/out.log" "$folder/broker.log" >&2 2>/dev/null || true
  fail "$name did not start; the last lines of its log are above, the rest is in $folder"
}

postgres_up() {
  if [ -n "${PENSTOCK_STORE:-}" ]; then
    say "PostgreSQL: using the one in PENSTOCK_STORE"
    store=$PENSTOCK_STORE
    return
  fi
  local folder=$stack/postgres port
  if pid_of "$folder" 'postgres -D data' >/dev/null; then
    port=$(cat "$folder/port")
    say "PostgreSQL: already running on port $port"
  else
    mkdir -p "$folder"
    # If run as root, the server runs as user postgres, who may not have access to this folder.
    if [ "$(id -u)" -eq 0 ] && ! setpriv --reuid=postgres --clear-groups test -x "$stack"; then
      rm -rf "$folder"
      ln -sfn "$(mktemp -d "${TMPDIR:-/tmp}/penstock-stack.XXXXXX")" "$folder"
      chmod 755 "$folder/"
    fi
    port=$(free_ports 1)
    say "PostgreSQL: starting on 127.0.0.1:$port, in $folder"
    start "$folder" "$tools/postgres.sh" run "$(realpath "$folder")" "$port"
    wait_for "$folder" PostgreSQL "$tools/postgres.sh" answers "$port"
    echo "$port" >"$folder/port"
  fi
  if [ ! -f "$folder/created" ]; then
    "$tools/postgres.sh" createdb "postgres://postgres@127.0.0.1:$port/postgres" penstock
    touch "$folder/created"
  fi
  store=postgres://postgres@127.0.0.1:$port/penstock
}

kafka_up() {
  if [ -n "${PENSTOCK_BUS:-}" ]; then
    say "Kafka: using the one in PENSTOCK_BUS"
    bus=$PENSTOCK_BUS
    return
  fi
  local brokers=${BROKERS:-1} ports id folder port voters='' addresses='' had
  [[ "$brokers" =~ ^[13]$ ]] || fail "BROKERS must be 1 or 3, not $brokers"
  "$tools/kafka.sh" jars >/dev/null
  had=$(find "$stack" -maxdepth 1 -name 'kafka-*' | wc -l)
  [ "$had" -eq 0 ] || [ "$had" -eq "$brokers" ] ||
    fail "$had broker(s) were started before; run make stack-down first to start $brokers"
  if [ "$had" -eq 0 ]; then
    read -ra ports <<<"$(free_ports $((2 * brokers)))"
    for id in $(seq "$brokers"); do
      mkdir -p "$stack/kafka-$id"
      echo "${ports[2 * id - 2]} ${ports[2 * id - 1]}" >"$stack/kafka-$id/ports"
    done
  fi
  for id in $(seq "$brokers"); do
    read -ra ports <"$stack/kafka-$id/ports"
    addresses+=,127.0.0.1:${ports[0]}
    voters+=,$id@127.0.0.1:${ports[1]}
  done
  for id in $(seq "$brokers"); do
    folder=$stack/kafka-$id
    read -ra ports <"$folder/ports"
    if pid_of "$folder" >/dev/null; then
      say "Kafka: broker $id is already running on port ${ports[0]}"
      continue
    fi
    say "Kafka: broker $id is starting on 127.0.0.1:${ports[0]}, in $folder"
    start "$folder" "$tools/kafka.sh" run "$folder" "$id" "${ports[@]}" "${voters#,}"
  done
  for id in $(seq "$brokers"); do
    read -r port _ <"$stack/kafka-$id/ports"
    wait_for "$stack/kafka-$id" "Kafka broker $id" "$tools/kafka.sh" answers "$stack/kafka-$id" "$port"
  done
  bus=kafka://${addresses#,}/penstock
}

up() {
  mkdir -p "$stack"
  chmod 755 "$stack"
  postgres_up
  kafka_up
  printf 'PENSTOCK_STORE=%s\nPENSTOCK_BUS=%s\n' "$store" "$bus" >"$stack/env"
  chmod 600 "$stack/env"
  say ".stack/env names both. To use them:  set -a; . .stack/env; set +a; penstock serve"
}

# Stops all servers, then kills the remaining ones.
down() {
  local folder pid pids=()
  if [ ! -d "$stack" ]; then
    say "nothing is up"
    return
  fi
  for folder in "$stack"/kafka-* "$stack/postgres"; do
    [ -d "$folder" ] || continue
    pid=$(pid_of "$folder" 'postgres -D data') || continue
    say "stopping $(basename "$folder")"
    # PostgreSQL: INT closes connections and flushes; TERM would wait for clients.
    case $folder in */postgres) kill -INT "$pid" ;; *) kill -TERM "$pid" ;; esac
    pids+=("$pid")
  done
  for _ in $(seq 100); do
    for pid in "${pids[@]+"${pids[@]}"}"; do
      kill -0 "$pid" 2>/dev/null && sleep 0.2 && continue 2
    done
    break
  done
  for pid in "${pids[@]+"${pids[@]}"}"; do
    kill -0 "$pid" 2>/dev/null || continue
    say "process $pid did not stop within 20 s, killing it"
    kill -KILL "$pid"
  done
  if [ -L "$stack/postgres" ]; then rm -rf "$(realpath "$stack/postgres")"; fi
  rm -rf "$stack"
  say "everything is down; .stack is gone"
}

status() {
  local missing=0 folder port
  [ -f "$stack/env" ] || fail "nothing is up; make stack-up starts it"
  cat "$stack/env"
  for folder in "$stack"/kafka-*; do
    [ -d "$folder" ] || continue
    read -r port _ <"$folder/ports"
    if "$tools/kafka.sh" answers "$folder" "$port"; then say "$(basename "$folder"): up"; else
      say "$(basename "$folder"): DOWN"
      missing=1
    fi
  done
  if [ -d "$stack/postgres" ]; then
    if "$tools/postgres.sh" answers "$(cat "$stack/postgres/port")"; then say "postgres: up"; else
      say "postgres: DOWN"
      missing=1
    fi
  fi
  return "$missing"
}

case "${1:-}" in
  up | down | status) "$1" ;;
  *) fail "usage: stack.sh up | down | status" ;;
esac
