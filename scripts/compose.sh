#!/usr/bin/env bash
# Has Docker Compose read deploy/compose.yaml, where its client is at hand; needs no engine. Other tests hold the file to
# the program's own flags and names.
set -euo pipefail
cd "$(dirname "$0")/../deploy"

if docker compose version >/dev/null 2>&1; then
  docker compose --file compose.yaml config --quiet
  echo "compose: Docker Compose accepts deploy/compose.yaml" >&2
else
  echo "compose: Docker Compose is not at hand, so it has not read deploy/compose.yaml" >&2
fi
