#!/usr/bin/env bash
# Builds an image on a Debian machine that has neither a Docker engine nor an image registry:
# mmdebstrap makes the base, buildah builds on it. Run as root; what follows goes on to buildah.
#
#   apt-get install --no-install-recommends buildah mmdebstrap
#   docker/build-without-docker.sh cpu --secret id=pip.conf,src=/etc/pip.conf
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1-}
if ! [[ -f docker/$kind.Dockerfile ]]; then
  echo "build-without-docker.sh: first argument '$kind': expected cpu or gpu" >&2
  exit 2
fi
shift

base=localhost/debian:bookworm-slim
image=localhost/tip-ray:0.1.0-$kind

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  mmdebstrap --variant=minbase --include=ca-certificates bookworm "$scratch/base.tar"
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$scratch/base.tar" /
  buildah commit --quiet --rm "$container" "$base"
fi

buildah build --isolation chroot --pull-never --build-arg "BASE_IMAGE=$base" \
  --file "docker/$kind.Dockerfile" --tag "$image" "$@" .
buildah images "$image"
