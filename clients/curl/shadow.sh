#!/bin/sh
# Asks one model and mirrors the question to the other; the pair lands in bitwatt_shadow_* metrics.
set -eu
url="${BITWATT_URL:-http://127.0.0.1:8000}"
key="Authorization: Bearer ${BITWATT_KEY:-none}"
curl --silent --show-error --fail-with-body "$url/v1/completions" \
    --header "$key" --header "Content-Type: application/json" --header "X-Bitwatt-Shadow: 1" \
    --data "{\"model\": \"${BITWATT_MODEL:-builtin}\", \"prompt\": \"def add(a, b):\", \"max_tokens\": 16, \"temperature\": 0}"
echo
sleep 2 # the mirror runs once the answer is complete and nobody else asks
curl --silent --show-error --fail-with-body "$url/metrics" --header "$key" | grep '^bitwatt_shadow'
