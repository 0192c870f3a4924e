#!/usr/bin/env bash
# Drafts adapted to a domain, on all of it and on halves: PROMPTS.jsonl WORK. SMOKE=1: first drafts of 40 chats, one seed.
# Without arguments: the tables of what was run, from results.jsonl.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
if (($# == 0)); then
    run 030_adaptation.table
    exit
fi
need 2 "PROMPTS.jsonl WORK" "$@"
mkdir -p "$2/answers"
jsfdd respond --target smollm2 --data "$1" --turns first --max-new-tokens 96 --max-length 512 --batch-size 64 \
    --keep-hidden full --out "$2/answers/a.jsonl"
if [[ ${SMOKE:-} ]]; then seeds=0; else seeds="0 1"; fi
# shellcheck disable=SC2086
run 030_adaptation.run --answers "$2/answers" --work "$2" --seeds $seeds
