#!/usr/bin/env bash
# Build an image of the Dockerfile and serve from it, without a container engine; root, on Debian.
#
#   deploy/build_in_chroot.sh [cpu|gpu]
#
#   CHROOT_IMAGE_DIR      folder for everything, gigabytes that are deleted at the end
#   TORCH_INDEX, LOCKED   as for docker build
#   PIP_CONFIG_FILE       pip's settings for the build, which sees them as /etc/pip.conf
#   CHROOT_EXTRA_VOLUMES  absolute paths those settings name, with spaces; the build may only read
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:-cpu}
uid=12345
folder=${CHROOT_IMAGE_DIR:-build/chroot-image}
export BUILDAH_ISOLATION=chroot

die() {
    echo "$0: $*" >&2
    exit 1
}

[[ $target == cpu || $target == gpu ]] || die "no target $target: cpu or gpu"
[ "$(id -u)" = 0 ] || die "only root may debootstrap and chroot"
for program in apt-get buildah curl debootstrap unshare; do
    command -v "$program" >/dev/null ||
        die "no $program: apt-get install apt buildah curl debootstrap util-linux"
done
mkdir -p "$folder"
work=$(mktemp -d "$(realpath "$folder")/XXXXXX")
export TMPDIR=$work
log=$work/server.log
server=

store() {
    buildah --storage-driver vfs --root "$work/storage" --runroot "$work/run" "$@"
}

clean_up() {
    status=$?
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true
    fi
    if [ "$status" != 0 ] && [ -f "$log" ]; then
        cat "$log" >&2
    fi
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 1' INT TERM

summary=
step() { # step NAME COMMAND...
    echo "== $1"
    local start=$SECONDS
    "${@:2}"
    summary+="$1: $((SECONDS - start)) s"$'\n'
}

make_base() {
    local mirror container
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -m 1 '/debian/$') ||
        die "apt's sources name no Debian mirror"
    # It leaves the mirror in the base's sources.list, for the Dockerfile's apt-get.
    debootstrap --variant=minbase bookworm "$work/base" "$mirror" >"$work/debootstrap.log" ||
        die "$(tail -n 5 "$work/debootstrap.log")"
    rm -rf "$work"/base/var/{cache/apt,lib/apt/lists}/*
    container=$(store from scratch)
    store add --quiet "$container" "$work/base" / >/dev/null
    store commit --quiet --rm "$container" localhost/base >/dev/null
    rm -rf --one-file-system "$work/base"
}

build_image() {
    local options=(--build-arg BASE=localhost/base) path
    if [ -n "${TORCH_INDEX:-}" ]; then
        options+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
    fi
    if [ -n "${LOCKED:-}" ]; then
        options+=(--build-arg "LOCKED=$LOCKED")
    fi
    if [ -n "${PIP_CONFIG_FILE:-}" ]; then
        options+=(--volume "$(realpath "$PIP_CONFIG_FILE"):/etc/pip.conf:ro")
    fi
    for path in ${CHROOT_EXTRA_VOLUMES:-}; do
        options+=(--volume "$path:$path:ro")
    done
    # The format of docker build, which has a health check.
    store build --format docker --pull=never --target "$target" --tag localhost/bitwatt \
        "${options[@]}" .
}

# What compose asks of an engine, as far as a chroot can: a user without a name, no capabilities,
# no new privileges, a read-only root with /tmp and /models writable.
enter() { # enter ROOT UID WORKDIR ENVIRONMENT... COMMAND...
    local root=$1 directory
    mount --bind "$root" "$root"
    mount --bind "$root/models" "$root/models"
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    for directory in dev proc sys; do
        mount --rbind "/$directory" "$root/$directory"
    done
    mount -o remount,bind,ro "$root"
    exec chroot "$root" setpriv --reuid "$2" --regid 0 --clear-groups --bounding-set -all \
        --inh-caps -all --no-new-privs env --ignore-environment --chdir "$3" "${@:4}"
}
export -f enter

of_image() { # of_image FIELD: a list of the image's configuration, a line for each element
    store inspect --type image --format "{{range .Docker.Config.$1}}{{println .}}{{end}}" \
        localhost/bitwatt | sed '/^$/d'
}

in_image() { # in_image NAME=VALUE... COMMAND...
    # shellcheck disable=SC2016
    exec unshare --mount --propagation private bash -euc 'enter "$@"' enter \
        "$root" "$uid" "$workdir" "${environment[@]}" "$@"
}

get() { # get PATH CURL_OPTION...
    curl --silent --show-error --fail-with-body --max-time 60 "${@:2}" "http://127.0.0.1:$port$1"
}

start_server() {
    local waited
    in_image BITWATT_HOST=127.0.0.1 BITWATT_PORT=0 "${command[@]}" >"$log" 2>&1 &
    server=$!
    for ((waited = 0; waited < 300; waited++)); do
        sleep 1
        kill -0 "$server" 2>/dev/null || die "the server ended before it was ready"
        port=$(grep -oPm 1 'http://127\.0\.0\.1:\K[0-9]+' "$log") || continue
        get /ready --output "$work/ready" 2>/dev/null || continue
        cat "$work/ready"
        echo
        # Without the kernels' library it would serve too, slowly.
        grep -oE '[^"]+ is ready after [^"]+: [^"]+ native on [^"]+' "$log" ||
            [ "$target" = gpu ] || die "the native kernels don't serve: $(cat "$log")"
        return
    done
    die "the server was not ready within 300 s"
}

ask_server() {
    local model chat
    get /v1/models | tee "$work/models.json"
    model=$(grep -oPm 1 '"id": ?"\K[^"]+' "$work/models.json" | head -n 1)
    chat='{"model": "'$model'", "max_tokens": 16, "temperature": 0,
           "messages": [{"role": "user", "content": "Hello"}]}'
    echo
    get /v1/chat/completions --json "$chat"
    echo
    get /metrics >"$work/metrics"
    grep -cv '^#' "$work/metrics" | sed 's/$/ series, among them:/'
    grep -E '^bitwatt_(engine_up|energy_available)|^vllm:generation_tokens_total|request_success_total.* [1-9]' \
        "$work/metrics"
}

stop_server() {
    local status=0
    kill -TERM "$server"
    wait "$server" || status=$?
    server=
    [ "$status" = 0 ] || die "the server ended with status $status"
    ! grep -lE "^Uid:\s+$uid\s" /proc/[0-9]*/status 2>/dev/null || die "it left processes"
}

step "debootstrap" make_base
step "build $target" build_image

container=$(store from --pull=never localhost/bitwatt)
root=$(store mount "$container")
workdir=$(store inspect --type image --format '{{.Docker.Config.WorkingDir}}' localhost/bitwatt)
mapfile -t environment < <(of_image Env)
mapfile -t command < <(of_image Entrypoint && of_image Cmd)

step "start" start_server
server_is=$(grep -E '^(Uid|Gid|CapEff|NoNewPrivs):' "/proc/$server/status" | tr '\t\n' ' ,')
root_is=$(awk '$5 == "/" {print $6}' "/proc/$server/mountinfo" | tail -n 1)
step "answers" ask_server
step "SIGTERM to end" stop_server

echo "== summary"
printf '%s' "$summary"
echo "image: $(store images --format '{{.Size}}' localhost/bitwatt)"
echo "server: $server_is root mounted $root_is"
(in_image python -c '
import platform, torch, bitwatt
print(f"Python {platform.python_version()}, torch {torch.__version__}, bitwatt {bitwatt.__version__}")
')
buildah --version
