#!/usr/bin/env bash
# Every arm on one pool of chats, and the tables: CHATS.jsonl PROMPTS_FOLDER WORK; stopped, it goes on in WORK.
# SMOKE=1: the paper's table on 16 chats. Without arguments: the tables of what was run, from results.jsonl.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
if (($# == 0)); then
    run 014_selection.tables
    exit
fi
need 3 "CHATS.jsonl PROMPTS_FOLDER WORK" "$@"
pool=(--data "$1" --prompts "$2" --work "$3")
if [[ ${SMOKE:-} ]]; then
    run 014_selection.run "${pool[@]}" --plans table
    run 014_selection.tables --work "$3" --chats 16 --out "$3"
    exit
fi
run 014_selection.run "${pool[@]}" --plans table --seeds 0 1 2
run 014_selection.run "${pool[@]}" --plans steps ratios controls better draft-aware dropout proxies --seeds 0 1 2
run 014_selection.tables --work "$3"
