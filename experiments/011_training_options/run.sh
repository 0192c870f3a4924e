#!/usr/bin/env bash
# What each training option costs and does to τ: WORK CHATS PROMPTS…; stopped, it goes on in WORK. SMOKE=1: three arms.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "WORK CHATS PROMPTS…" "$@"
run 011_training_options.run --work "$1" --data "$2" --prompts "${@:3}"
