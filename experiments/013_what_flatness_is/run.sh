#!/usr/bin/env bash
# ON_POLICY.jsonl OFF_POLICY_FOLDER WORK; stopped, it goes on in WORK. SMOKE=1: three chats of each source.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "ON_POLICY.jsonl OFF_POLICY_FOLDER WORK" "$@"
on=$1 off=$2 work=$3
run 013_what_flatness_is.score --data "$off"/*.jsonl.gz --out "$work/off"
if [[ ${SMOKE:-} ]]; then
    head -n 12 "$on" > "$work/few.jsonl"
    on=$work/few.jsonl
fi
jsfdd score --target smollm2 --data "$on" --per-token --max-length 384 --batch-tokens 1024 --out "$work/on"
run 013_what_flatness_is.analyse --on-data "$on" --on "$work/on" --off "$work/off"
