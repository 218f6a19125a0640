#!/bin/sh
# Asks by Anthropic's API. BITWATT_URL, BITWATT_MODEL and BITWATT_KEY say whom.
set -eu
curl --silent --show-error --fail-with-body "${BITWATT_URL:-http://127.0.0.1:8000}/v1/messages" \
    --header "x-api-key: ${BITWATT_KEY:-none}" \
    --header "Content-Type: application/json" \
    --data @- <<JSON
{
  "model": "${BITWATT_MODEL:-builtin}",
  "messages": [{"role": "user", "content": "What does os.path.join do?"}],
  "max_tokens": 64
}
JSON
echo
