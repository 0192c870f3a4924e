#!/usr/bin/env bash
# What a draft's confidence says of its acceptance: CHATS.jsonl PROMPTS_FOLDER WORK, the directory of 014. SMOKE=1: 16 chats.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "CHATS.jsonl PROMPTS_FOLDER WORK" "$@"
pool=(--data "$1" --prompts "$2" --work "$3")
run 018_confidence.run "${pool[@]}"
