#!/usr/bin/env bash
# A private PostgreSQL server, separate from the system's.
#
#   postgres.sh run FOLDER PORT [SIGNAL]    creates a cluster in FOLDER if it is new and runs its server, in the
#                                           foreground; gets SIGNAL when its parent ends
#   postgres.sh answers PORT                succeeds if the server accepts connections
#   postgres.sh createdb URL NAME [OWNER]   creates a database on the server of URL
#   postgres.sh role URL NAME PASSWORD      creates a role that may log in
#
# It trusts all connections on loopback (user postgres). PostgreSQL refuses root, so root runs it as user postgres.
# POSTGRES_SECURED=FOLDER, with server.crt and server.key, trusts user postgres only on its socket in FOLDER of `run`:
# network connections need TLS and a password. POSTGRES_OPTIONS has more server options.
set -euo pipefail

fail() {
  echo "postgres: $*" >&2
  exit 1
}

programs() {
  local newest
  # Debian installs them outside PATH, by version.
  newest=$(find /usr/lib/postgresql -mindepth 3 -maxdepth 3 -path '*/bin/initdb' 2>/dev/null | sort -V | tail -1)
  [ -n "$newest" ] || newest=$(realpath "$(command -v initdb)" 2>/dev/null || true)
  [ -n "$newest" ] ||
    fail "there is no PostgreSQL server, which the tests need. Run scripts/setup.sh stack, or install postgresql-15." \
      "To do without, name postgres in PENSTOCK_SKIP"
  dirname "$newest"
}

run() {
  local folder=$1 port=$2 signal=${3:-clear} bin as=()
  bin=$(programs)
  mkdir -p "$folder"
  if [ "$(id -u)" -eq 0 ]; then
    id postgres >/dev/null 2>&1 || fail "PostgreSQL refuses to run as root, and there is no user postgres to run it as"
    chown -R postgres "$folder"
    as=(setpriv --reuid=postgres --regid=postgres --init-groups)
    "${as[@]}" test -w "$folder" || fail "user postgres cannot reach $folder"
  fi
  cd "$folder"
  if [ ! -f data/PG_VERSION ]; then
    "${as[@]}" "$bin/initdb" -D data -U postgres -A trust -E UTF8 --locale=C --no-sync >/dev/null
  fi
  local tls=()
  if [ -n "${POSTGRES_SECURED:-}" ]; then
    mkdir -p tls
    cp "$POSTGRES_SECURED/server.crt" "$POSTGRES_SECURED/server.key" tls/
    printf 'local all postgres trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n' >tls/hba
    [ "${#as[@]}" -eq 0 ] || chown -R postgres tls
    chmod 600 tls/server.key
    tls=(-c ssl=on -c "ssl_cert_file=$folder/tls/server.crt" -c "ssl_key_file=$folder/tls/server.key"
      -c "hba_file=$folder/tls/hba")
  fi
  # Changing the user clears the parent-death signal, so it is set last.
  [ "${#as[@]}" -gt 0 ] || as=(setpriv)
  exec "${as[@]}" --pdeathsig "$signal" "$bin/postgres" -D data -p "$port" -k "$folder" \
    -c listen_addresses=127.0.0.1 -c max_connections=300 -c shared_buffers=32MB \
    "${tls[@]+"${tls[@]}"}" ${POSTGRES_OPTIONS:-}
}

case "${1:-}" in
  run) shift; run "$@" ;;
  answers) bin=$(programs); "$bin/pg_isready" -q -h 127.0.0.1 -p "$2" -U postgres -d postgres ;;
  createdb) bin=$(programs); "$bin/createdb" --maintenance-db="$2" ${4:+-O "$4"} "$3" ;;
  role) bin=$(programs); "$bin/psql" -qX -d "$2" -c "CREATE ROLE \"$3\" LOGIN PASSWORD '$4'" ;;
  *) fail "usage: postgres.sh run FOLDER PORT [SIGNAL] | answers PORT | createdb URL NAME [OWNER] | role URL NAME PASSWORD" ;;
esac
