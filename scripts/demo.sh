#!/usr/bin/env bash
# Builds Penstock, starts it with the example endpoint, replays an hour of real load in a minute, shows how instances
# followed it and why, and stops everything again. Exits 0 only if every step succeeded and no request failed.
#
#   scripts/demo.sh           in a temporary folder, on free ports; leaves nothing behind
#   scripts/demo.sh --stay    in the default data folder (or DATA=DIR), running until Ctrl-C
set -euo pipefail
cd "$(dirname "$0")/.."

stay=no
[ "${1:-}" = --stay ] && stay=yes
trace=deploy/examples/traces/diurnal-1h.txt.gz
# 90 to 394 requests per second are more than two cores can score while running everything else.
scale_rate=0.4

heading() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
[ -t 1 ] || heading() { printf '\n== %s\n' "$*"; }
fail() {
  echo "demo: $*" >&2
  exit 1
}

heading "Build (profile demo)"
# The quickstart documents name the scorer in target/demo, so the environment must not change the folder.
cargo build --locked --profile demo --target-dir target --no-default-features -p penstock -p penstock-scorer --bins
penstock=target/demo/penstock
began=$SECONDS

server=
scratch=$(mktemp -d "${TMPDIR:-/tmp}/penstock-demo.XXXXXX")
instances=()

# Runs on every exit: end of the script, an error, Ctrl-C, SIGTERM.
finish() {
  status=$?
  trap - EXIT INT TERM
  stop_server || status=1
  # 130 and 143: interrupted by the user.
  if [ "$status" -ne 0 ] && [ "$status" -ne 130 ] && [ "$status" -ne 143 ] && [ -s "$scratch/serve.log" ]; then
    echo "demo: the last lines of the server's log:" >&2
    tail -n 20 "$scratch/serve.log" >&2
  fi
  rm -rf "$scratch"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Whether a process is running; a zombie is not.
runs() { grep -q '^State:[[:space:]]*[^XZ]' "/proc/$1/status" 2>/dev/null; }

# Stops the server, and with it the instances; kills it after 20 seconds.
stop_server() {
  [ -n "$server" ] || return 0
  local pid=$server status=0
  server=
  kill -TERM "$pid" 2>/dev/null || true
  for _ in $(seq 200); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  if kill -0 "$pid" 2>/dev/null; then
    echo "demo: the server did not stop within 20 s" >&2
    kill -KILL "$pid" 2>/dev/null || true
    status=1
  fi
  wait "$pid" 2>/dev/null || status=1
  for pid in "${instances[@]}"; do
    runs "$pid" || continue
    echo "demo: instance $pid outlived the server" >&2
    status=1
  done
  return "$status"
}

# The address, or a free port if it is in use.
address() {
  if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then
    echo "demo: port $1 is in use, using a free one" >&2
    echo 127.0.0.1:0
  else
    echo "127.0.0.1:$1"
  fi
}

heading "Start"
if [ "$stay" = yes ]; then
  data=${DATA:-${XDG_DATA_HOME:-$HOME/.local/share}/penstock}
  control=$(address 7070)
  gateway=$(address 8080)
else
  data=$scratch/data
  control=127.0.0.1:0
  gateway=127.0.0.1:0
fi
# The user's client settings may point elsewhere.
unset PENSTOCK_SERVER PENSTOCK_TOKEN PENSTOCK_STORE PENSTOCK_BUS
export PENSTOCK_CONFIG=$data/client.json
ready=$scratch/ready.json
"$penstock" serve --data "$data" --control-addr "$control" --gateway-addr "$gateway" --ready-file "$ready" \
  >"$scratch/serve.log" 2>&1 &
server=$!
for _ in $(seq 300); do
  [ -s "$ready" ] && break
  kill -0 "$server" 2>/dev/null || fail "the server exited during startup"
  sleep 0.1
done
[ -s "$ready" ] || fail "the server was not ready within 30 s"
url() { sed -n "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/p" "$ready"; }
echo "control API  $(url control)"
echo "gateway      $(url gateway)"
echo "data         $data"
adopted=$(grep -c '"adopted"' "$scratch/serve.log" || true)
[ "$adopted" -eq 0 ] || echo "adopted      $adopted instances left running by an earlier server"

heading "Apply deploy/examples/quickstart"
"$penstock" apply -f deploy/examples/quickstart --wait --timeout 1m
"$penstock" get deployments
"$penstock" invoke iris --data '{"data":[[5.1,3.5,1.4,0.2],[6.3,3.3,6.0,2.5]]}'

if [ "$stay" = yes ]; then
  heading "Up; Ctrl-C stops it"
  cat <<HINTS
The server is process $server; it writes to $scratch/serve.log.
In another terminal, from this folder:

  export PENSTOCK_CONFIG=$PENSTOCK_CONFIG
  $penstock top
  $penstock load iris --trace $trace --compress 60 --scale-rate $scale_rate --chart
  $penstock decisions iris/blue          then: $penstock explain ID
  $penstock traffic iris blue=50 green=50
  $penstock logs iris/green --follow
  $penstock keys iris                    the keys that clients send as a bearer token

HINTS
  # From here on, an interrupt is the normal exit.
  trap 'exit 0' INT TERM
  wait "$server" || fail "the server exited"
  server=
  exit 0
fi

heading "Replay an hour of requests in a minute"
"$penstock" load iris --trace "$trace" --compress 60 --scale-rate "$scale_rate" --max-errors 0 --chart

heading "Decisions"
"$penstock" decisions iris/blue --limit 500 >"$scratch/decisions.txt"
width=1000
[ -t 1 ] && width=$(tput cols 2>/dev/null || echo 100)
head -n 12 "$scratch/decisions.txt" | awk -v w="$width" '{ if (length($0) > w) $0 = substr($0, 1, w - 3) "..."; print }'
count=$(($(wc -l <"$scratch/decisions.txt") - 1))
# Explain the scale-out to the most instances: columns are id, time, deployment, from, ->, to, outcome.
decision=$(awk '$5 == "->" && $6 > $4 && $7 == "applied" && $6 > most { most = $6; id = $1 } END { print id }' \
  "$scratch/decisions.txt")
[ -n "$decision" ] || fail "no decision to scale out was applied: instances did not follow the load"

heading "Why? penstock explain $decision"
"$penstock" explain "$decision"

heading "Stop"
for pid in $("$penstock" get instances -o json | grep -o '"pid" *: *[0-9]*' | grep -o '[0-9]*$'); do
  if runs "$pid"; then instances+=("$pid"); fi
done
stop_server || fail "the server did not stop cleanly"
echo "server and ${#instances[@]} instances stopped; $count decisions for iris/blue; $((SECONDS - began)) s since the build"
