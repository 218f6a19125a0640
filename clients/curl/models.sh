#!/bin/sh
# Lists the models, and what the server says of both sides of the comparison.
set -eu
url="${BITWATT_URL:-http://127.0.0.1:8000}"
key="Authorization: Bearer ${BITWATT_KEY:-none}"
curl --silent --show-error --fail-with-body "$url/v1/models" --header "$key"
echo
curl --silent --show-error --fail-with-body "$url/bitwatt/v1/comparison" --header "$key"
echo
