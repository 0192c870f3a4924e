#!/usr/bin/env bash
# Create a TPU VM or pod slice and install jsfdd[tpu] on all of its hosts.
#   tpu/create.sh [--dry-run]      settings: tpu/env.sh
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tpu/env.sh
source "$here/env.sh"
case "${1:-}" in
  "") ;;
  --dry-run) dry_run=1 ;;
  *) echo "usage: tpu/create.sh [--dry-run]" >&2; exit 2 ;;
esac

if [ "$TPU_SPOT" = 1 ]; then
  run gcloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" "${where[@]}" \
    --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_VERSION" --spot
  while
    run gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" --format='value(state.state)'
    [ "$dry_run" = 0 ]
  do
    state="$(gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" --format='value(state.state)')"
    case "$state" in
      ACTIVE) break ;;
      FAILED | SUSPENDED | SUSPENDING)
        echo "the request ended as $state; delete it (tpu/README.md) and try again, or in another zone" >&2
        exit 1
        ;;
      *) sleep "$TPU_EVERY" ;;
    esac
  done
else
  run gcloud compute tpus tpu-vm create "$TPU_NAME" "${where[@]}" --accelerator-type="$TPU_TYPE" --version="$TPU_VERSION"
fi

if [ -n "$TPU_SHARE" ]; then
  on_workers all "sudo apt-get -q update && sudo apt-get -qy install nfs-common && sudo mkdir -p $TPU_WORK && sudo mount -t nfs $TPU_SHARE $TPU_WORK && sudo chmod 777 $TPU_WORK"
else
  on_workers all "sudo mkdir -p $TPU_WORK && sudo chmod 777 $TPU_WORK"
fi

# Install the committed state of this checkout into its own environment: the image's Python may be older than 3.11.
archive="$(mktemp -d)/jsfdd.tar.gz"
run git -C "$here/.." archive --format=tar.gz --prefix=jsfdd/ -o "$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME": "${where[@]}" --worker=all
on_workers all "tar xzf jsfdd.tar.gz && python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python 3.12 venv && python3 -m uv pip install -q --python venv/bin/python './jsfdd[tpu]'"
on_workers all "venv/bin/jsfdd --help > /dev/null && echo jsfdd is ready"
