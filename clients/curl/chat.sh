#!/bin/sh
# Streams an answer. BITWATT_URL, BITWATT_MODEL and BITWATT_KEY say whose.
set -eu
curl --silent --show-error --fail-with-body --no-buffer \
    "${BITWATT_URL:-http://127.0.0.1:8000}/v1/chat/completions" \
    --header "Authorization: Bearer ${BITWATT_KEY:-none}" \
    --header "Content-Type: application/json" \
    --data @- <<JSON
{
  "model": "${BITWATT_MODEL:-builtin}",
  "messages": [{"role": "user", "content": "What does os.path.join do?"}],
  "max_tokens": 64,
  "seed": 1,
  "stream": true,
  "stream_options": {"include_usage": true}
}
JSON
