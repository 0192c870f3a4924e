#!/usr/bin/env bash
# Kills at any moment and disks that are too small, over all stages, on a toy target: WORK. SMOKE=1: six kills, one disk a stage.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 1 "WORK" "$@"
export JAX_PLATFORMS=cpu PYTHONPATH="$PYTHONPATH:$root/tests"
here="$root/experiments/026_kills"
if [[ ${SMOKE:-} ]]; then
    run 026_kills.kills "$1" --kills 6
    run 026_kills.disk "$1" --shares 0.5 --kinds ENOSPC
    exit
fi
run 026_kills.kills "$1" --kills 100 | tee "$here/results.jsonl"
run 026_kills.disk "$1" | tee --append "$here/results.jsonl"
run 026_kills.pair "$1" | tee --append "$here/results.jsonl"
