#!/usr/bin/env bash
# Run a jsfdd command on all hosts of the TPU, or fetch its results.
#   tpu/run.sh [--dry-run] [--until-done] STAGE OPTIONS…     e.g. score --target /mnt/jsfdd/target --data … --out /mnt/jsfdd/run
#   tpu/run.sh [--dry-run] --fetch REMOTE LOCAL              copy a directory from the first host
# --until-done: if the TPU is taken away, request a new one and repeat the command, which continues where it stopped.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tpu/env.sh
source "$here/env.sh"
until_done=0
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=1 ;;
    --until-done) until_done=1 ;;
    *) break ;;
  esac
  shift
done
if [ $# -eq 0 ]; then
  sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

if [ "$1" = --fetch ]; then
  if [ $# -ne 3 ]; then echo "usage: tpu/run.sh --fetch REMOTE LOCAL" >&2; exit 2; fi
  run gcloud compute tpus tpu-vm scp --recurse "$TPU_NAME:$2" "$3" "${where[@]}" --worker=0
  exit
fi

# Stages that can run as several processes start on all hosts and find each other; other commands use one host.
case "$1" in
  respond | score | select | train | evaluate) workers=all; more=(--coordinator auto) ;;
  *) workers=0; more=() ;;
esac
command="cd $(printf '%q' "$TPU_WORK") && \$HOME/venv/bin/jsfdd $(printf '%q ' "$@" ${more[@]+"${more[@]}"})"

while ! on_workers "$workers" "$command"; do
  state="$(gcloud compute tpus tpu-vm describe "$TPU_NAME" "${where[@]}" --format='value(state)' || true)"
  if [ "$until_done" = 0 ] || [ "$state" = READY ]; then
    echo "the command failed (the TPU is ${state:-gone})" >&2
    exit 1
  fi
  run gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet
  "$here/create.sh"
done
