#!/usr/bin/env bash
# What a whole run costs, stage by stage: CHATS.jsonl PROMPTS_FOLDER WORK, the directory of 014. SMOKE=1: 16 chats, no table.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "CHATS.jsonl PROMPTS_FOLDER WORK" "$@"
pool=(--data "$1" --prompts "$2" --work "$3")
if [[ ${SMOKE:-} ]]; then
    run 020_whole_run.run "${pool[@]}" --seeds 0 --only half
    exit
fi
run 020_whole_run.run "${pool[@]}" --seeds 0
run 020_whole_run.run "${pool[@]}" --seeds 1 --only "random half of its"
run 020_whole_run.table --work "$3"
