#!/usr/bin/env bash
# EAGLE-2, HASS and EAGLE-3 at equal steps and at equal CPU seconds: CHATS.jsonl PROMPTS_FOLDER WORK. SMOKE=1: 16 chats, one seed.
# Without arguments: the tables of what was run, from results.jsonl.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
if (($# == 0)); then
    run 023_eagle3.table
    exit
fi
need 3 "CHATS.jsonl PROMPTS_FOLDER WORK" "$@"
pool=(--data "$1" --prompts "$2" --work "$3")
if [[ ${SMOKE:-} ]]; then
    run 023_eagle3.run "${pool[@]}" --seeds 0 --only "EAGLE-2"
    exit
fi
run 023_eagle3.parts "${pool[@]}"
run 023_eagle3.run "${pool[@]}" --seeds 0 1
run 023_eagle3.run "${pool[@]}" --seeds 0 1 --halves
