#!/usr/bin/env bash
# Flatness within clusters on other chats: CHATS.jsonl PROMPTS_FOLDER WORK, the directory of 014. SMOKE=1: in three minutes.
# Without arguments: the tables of what was run, from results.jsonl.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
if (($# == 0)); then
    run 022_clusters.tables
    exit
fi
need 3 "CHATS.jsonl PROMPTS_FOLDER WORK" "$@"
pool=(--data "$1" --prompts "$2" --work "$3")
run 022_clusters.run "${pool[@]}" --first
