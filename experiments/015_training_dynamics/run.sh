#!/usr/bin/env bash
# Tokens of different flatness while a draft trains: CHATS.jsonl PROMPTS_FOLDER WORK, the directory of 014. SMOKE=1: 16 chats.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "CHATS.jsonl PROMPTS_FOLDER WORK" "$@"
pool=(--data "$1" --prompts "$2" --work "$3")
run 015_training_dynamics.run "${pool[@]}"
