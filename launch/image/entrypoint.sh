#!/bin/sh
# Runs its arguments. Caches get a folder of this user on this node: in a container the home may be missing, read-only,
# or one that all nodes share, the user may have no name, and /tmp may be that of the host, where others write too.
set -eu
tmp="${TMPDIR:-/tmp}"
[ -w "$tmp" ] || tmp=/tmp # that of the host may not exist in here
cache="$tmp/foundation-$(id -u)"
mkdir -m 700 "$cache" 2>/dev/null || [ -O "$cache" ] || cache=$(mktemp -d -p "$tmp")
export USER="${USER:-uid-$(id -u)}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}"
export SAR_FOUNDATION_CACHE="${SAR_FOUNDATION_CACHE:-$cache/sar-foundation}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$cache/matplotlib}"
[ -w "${HOME:-/}" ] || export HOME="$cache"
exec "$@"
