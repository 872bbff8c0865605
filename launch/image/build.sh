#!/usr/bin/env bash
# Build an image without a daemon and look at it from inside:  launch/image/build.sh [runtime|server|dev]
#
# Needs root, buildah and 25 GB; debootstrap too, unless BASE names an image. Removes all of it at the end, or with
# KEEP=FILE writes the image there (docker load, enroot import, apptainer build read it).
#   BASE      image to begin with (default: made by debootstrap of SUITE, Debian's trixie)
#   STORE     folder to build in (default: a new one under TMPDIR)
#   PIP_CONF, CA    pip.conf and certificates of a private index; they do not stay in the image
#   ARGS      more words for buildah build, such as: --build-arg EXTRAS=timm
set -euo pipefail
target=${1:-runtime}
project=$(cd "$(dirname "$0")/../.." && pwd)
store=${STORE:-$(mktemp -d -t foundation-image-XXXX)}
mkdir -p "$store/tmp"
# Layers in overlays where the kernel has them: vfs copies 7 GB for every line.
export STORAGE_DRIVER=${STORAGE_DRIVER:-overlay} TMPDIR=$store/tmp BUILDAH_ISOLATION=chroot
build() { command buildah --root "$store/layers" --runroot "$store/run" "$@"; }
clean() {
  build rm --all >/dev/null 2>&1 || true
  [ -n "${STORE:-}" ] || { build rmi --all --force >/dev/null 2>&1 || true; rm -rf "$store"; }
}
trap clean EXIT

suite=${SUITE:-trixie}
base=${BASE:-localhost/debian:$suite}
if [ -z "${BASE:-}" ] && ! build inspect --type image "$base" >/dev/null 2>&1; then
  debootstrap --variant=minbase "$suite" "$store/debian" http://deb.debian.org/debian >"$store/debootstrap.log"
  rm -f "$store"/debian/var/cache/apt/archives/*.deb
  empty=$(build from scratch)
  build copy --quiet "$empty" "$store/debian" / >/dev/null
  build commit --quiet --rm "$empty" "$base" >/dev/null
  rm -rf "$store/debian"
fi

# The format of Docker: that of OCI has no health check.
secrets=(${PIP_CONF:+--secret "id=pip.conf,src=$PIP_CONF"} ${CA:+--secret "id=ca,src=$CA"})
revision=$(git -C "$project" describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || true)
image=localhost/foundation-$target
# shellcheck disable=SC2086  # ARGS are words
build build --format docker --layers --target "$target" --tag "$image" \
  --build-arg "BASE=$base" --build-arg "REVISION=$revision" "${secrets[@]}" ${ARGS:-} "$project"

container=$(build from --pull-never "$image")
mapfile -t health < <(build inspect --type image "$image" | python3 -c '
import json, sys
print(*json.load(sys.stdin)["Docker"]["config"].get("Healthcheck", {}).get("Test", [])[1:], sep="\n")')
says() { printf '\n== %s\n' "$*"; }
inside() {  # USER COMMAND...: without a home or a name, as a scheduler may start it
  build run --user "$1" --env HOME=/nonexistent "$container" -- "${@:2}"
}
inside 0 touch /before
inside 0 sleep 1.1

case $target in
runtime)
  for user in 1000 12345:12345; do
    says "user $user: ${health[*]}"
    inside "$user" "${health[@]}"
    for what in attention engines; do
      says "user $user: foundation list $what"
      inside "$user" /opt/foundation/bin/entrypoint foundation list "$what"
    done
    says "user $user: the CUDA kernels load without nvcc, and are of this source"
    inside "$user" sh -c '! command -v nvcc'
    inside "$user" python3 -c '
from kernels.rpe_attention import building, cuda
cuda.library("cuda")
print(building.PREBUILT, *sorted({each.architecture for each in building.statistics(building.PREBUILT)}))'
  done
  ;;
server)
  says "MLflow answers: ${health[*]}"
  inside 12345:12345 env MLFLOW_HOST=127.0.0.1 MLFLOW_PORT="${PORT:-5999}" MLFLOW_BACKEND_STORE_URI=sqlite:////tmp/mlflow.db \
    MLFLOW_ARTIFACTS_DESTINATION=/tmp/artifacts sh -c '
      cd /; mlflow server >/tmp/log 2>&1 & server=$!
      for _ in $(seq 60); do sleep 3; if "$@" 2>/tmp/error; then kill $server; echo healthy; exit 0; fi; done
      cat /tmp/log /tmp/error; exit 1' sh "${health[@]}"
  ;;
dev)
  says "the project is built and tested from a mounted clone"
  build run --user 12345:12345 --env HOME=/nonexistent --volume "$project:/workspace:ro" "$container" -- \
    /opt/foundation/bin/entrypoint sh -c 'nvcc --version | tail -1; ruff --version
      python -m pytest -p no:cacheprovider tests/unit/test_rpe_building.py tests/unit/test_image.py'
  ;;
esac

says "written outside of /tmp:"
written=$(inside 0 find / -xdev -newer /before -type f -not -path '/tmp/*' -not -path '/etc/*' -not -path '/run/*')
echo "${written:-nothing}"
[ -z "$written" ]
if [ -n "${KEEP:-}" ]; then build push "$image" "docker-archive:$KEEP:foundation:$target"; fi
