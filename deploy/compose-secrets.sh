#!/bin/bash
# Generates the secrets of compose.yaml, once, in deploy/secrets, which is accessible only to its owner. Never
# overwrites: a new seal key could not unseal existing secrets, and PostgreSQL keeps its first password.
set -euo pipefail

cd "$(dirname "$0")"
if [[ -e secrets ]]; then
    echo "compose-secrets.sh: $PWD/secrets exists and is left as it is; move it away only to start a new installation" >&2
    exit 1
fi
umask 077
# In a temporary folder until complete, so that an interrupted run leaves nothing that looks finished.
made=$(mktemp -d ./secrets.XXXXXX)
trap 'rm -rf "$made"' EXIT

secret() { od -An -v -tx1 -N32 /dev/urandom | tr -d " \n" >"$made/$1"; }
secret internal-token
secret seal-key
secret postgres-password
secret grafana-password
# The password again, for Penstock: HOST:PORT:DATABASE:USER:PASSWORD.
printf 'postgres:5432:penstock:penstock:%s\n' "$(cat "$made/postgres-password")" >"$made/pgpass"
mkdir "$made/prometheus"
cp "$made/internal-token" "$made/prometheus/internal-token"

# Penstock's image runs as the owner of these files. If that is root, as a separate user.
user=$(id -u) group=$(id -g)
if [[ $user == 0 ]]; then
    user=10001 group=10001
    chown "$user:$group" "$made"/{internal-token,seal-key,pgpass}
fi
# The images of Prometheus and Grafana have their own users, who must read these; on this machine the parent
# folder denies access to others.
chmod 0755 "$made/prometheus"
chmod 0444 "$made/grafana-password" "$made/prometheus/internal-token"

printf 'PENSTOCK_UID=%s\nPENSTOCK_GID=%s\n' "$user" "$group" >.env
mv -T "$made" secrets
trap - EXIT
echo "made $PWD/secrets; keep a copy of seal-key where the backups are not"
