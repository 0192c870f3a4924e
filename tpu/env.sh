# shellcheck shell=bash
# Settings of all scripts here, to be sourced. Each setting can be overridden in the environment.

: "${TPU_NAME:=jsfdd}"                          # name of the TPU, and of its queued resource
: "${TPU_PROJECT:=}"                            # default: gcloud's own setting
: "${TPU_ZONE:=us-west4-a}"
: "${TPU_TYPE:=v5litepod-8}"                    # v5litepod-8: one host, 8 chips; v5litepod-16: four hosts, 4 chips each
: "${TPU_VERSION:=v2-alpha-tpuv5-lite}"         # v5p: v2-alpha-tpuv5; v6e: v2-alpha-tpuv6e; v4: tpu-ubuntu2204-base
: "${TPU_SPOT:=0}"                              # 1: a spot TPU, cheaper but may be taken away; uses a queued resource
: "${TPU_SHARE:=}"                              # HOST:/EXPORT of an NFS share (Filestore); needed for more than one host
: "${TPU_WORK:=/mnt/jsfdd}"                     # mount point of the share, for data, target and --out
: "${TPU_EVERY:=60}"                            # seconds between two checks of a queued resource

dry_run=0

# Print a command, and run it unless this is a dry run.
run() {
  printf '%q ' "$@"
  printf '\n'
  if [ "$dry_run" = 0 ]; then "$@"; fi
}

where=(--zone="$TPU_ZONE" ${TPU_PROJECT:+--project="$TPU_PROJECT"})

# on_workers WHICH COMMAND: run a shell command on worker WHICH (0, 1, … or all).
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"
}
