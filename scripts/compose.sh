#!/usr/bin/env bash
# Validates deploy/compose.yaml with Docker Compose if its client is installed; needs no engine. Other tests check the
# file against the program's flags and names.
set -euo pipefail
cd "$(dirname "$0")/../deploy"

if docker compose version >/dev/null 2>&1; then
  docker compose --file compose.yaml config --quiet
  echo "compose: Docker Compose accepts deploy/compose.yaml" >&2
else
  echo "compose: Docker Compose is not at hand, so it has not read deploy/compose.yaml" >&2
fi
