#!/usr/bin/env bash
# Drafts alone and together: CHATS.jsonl PROMPTS_FOLDER WORK, the directory of 014. SMOKE=1: 16 chats, one training.
# Without arguments: the tables of what was run, from results.jsonl and clock.jsonl.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
if (($# == 0)); then
    run 017_taps.tables
    exit
fi
need 3 "CHATS.jsonl PROMPTS_FOLDER WORK" "$@"
pool=(--data "$1" --prompts "$2" --work "$3")
if [[ ${SMOKE:-} ]]; then
    run 017_taps.drafts "${pool[@]}" --trainings EAGLE-2 --seeds 0
    run 017_taps.replays "${pool[@]}" --trainings EAGLE-2 --seeds 0 --temperatures 0
    run 017_taps.clock "${pool[@]}" --trainings EAGLE-2 --temperatures 0
    exit
fi
run 017_taps.drafts "${pool[@]}" --trainings EAGLE-2 HASS --seeds 0 1
run 017_taps.drafts "${pool[@]}" --trainings EAGLE-2 --seeds 0 1 --flattest
run 017_taps.replays "${pool[@]}" --trainings EAGLE-2 HASS --seeds 0 1 --temperatures 0 1
run 017_taps.replays "${pool[@]}" --trainings EAGLE-2 --seeds 0 1 --temperatures 0 1 --flattest
run 017_taps.clock "${pool[@]}" --trainings EAGLE-2 HASS --temperatures 0 1
run 017_taps.clock "${pool[@]}" --trainings EAGLE-2 --temperatures 0 --tree 3 4 12
