#!/usr/bin/env bash
# Write deploy/locked/: every package of the images, by version and SHA-256; needs uv.
#
#   deploy/lock.sh [UV_OPTION...]    such as --upgrade, or --upgrade-package NAME
#
#   TORCH_WHEELS  folder with PyTorch's wheel for CPUs, in place of PyTorch's own index
set -euo pipefail
cd "$(dirname "$0")/.."

lock() { # lock FILE UV_OPTION...
    uv pip compile --quiet --generate-hashes --no-annotate \
        --custom-compile-command deploy/lock.sh --output-file "deploy/locked/$1" "${@:2}"
}

torch=(--torch-backend cpu)
if [ -n "${TORCH_WHEELS:-}" ]; then
    torch=(--find-links "$TORCH_WHEELS")
fi

# PyTorch's builds for CPUs have a version of their own, with a wheel for each Python and processor:
# this is Debian bookworm's, on x86-64.
lock cuda.txt pyproject.toml --extra nvidia --extra otel --universal --python-version 3.11 "$@"
versions=$(sed -n 's/^\(torch==[^ ]*\)/\1+cpu/; s/^\([a-z].*\) \\$/\1/p' deploy/locked/cuda.txt)
lock cpu.txt pyproject.toml --extra otel --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 "${torch[@]}" \
    --constraint <(echo "$versions") "$@"
lock build.txt - --universal --python-version 3.11 "$@" <<<"
cmake>=3.26
ninja>=1.11
scikit-build-core>=0.11"
