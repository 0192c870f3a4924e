#!/usr/bin/env bash
# Losses, HASS, vocabularies and tokens: CHATS.jsonl PROMPTS_FOLDER WORK, the directory of 014, whose arms it compares with.
# SMOKE=1: 16 chats.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "CHATS.jsonl PROMPTS_FOLDER WORK" "$@"
pool=(--data "$1" --prompts "$2" --work "$3")
run 016_training_recipes.run "${pool[@]}"
run 016_training_recipes.tables --work "$3" ${SMOKE:+--out "$3"}
