#!/usr/bin/env bash
# ON_POLICY.jsonl OFF_POLICY_FOLDER WORK; stopped, it goes on in WORK. SMOKE=1: three chats of each source.
set -euo pipefail
on=$1 off=$2 work=$3
here=$(dirname "$0")
python "$here/score.py" --data "$off"/*.jsonl.gz --out "$work/off"
python "$here/score.py" --data "$on" --out "$work/on"
if [[ ${SMOKE:-} ]]; then
    exec python "$here/analyse.py" --on "$work/on" --off "$work/off"
fi
jsfdd score --target smollm2 --data "$on" --max-length 384 --batch-tokens 1024 --out "$work/all"
python "$here/analyse.py" --on "$work/on" --off "$work/off" --on-scores "$work/all/scores.parquet"
