#!/usr/bin/env bash
# Answers the demo's training prompts with SmolLM2. SMOKE=1: ten prompts, into a temporary directory.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
demo=$root/jsfdd/data/demo
if [[ ${SMOKE:-} ]]; then
    out=$(mktemp -d)
    head -n 10 "$demo/train_prompts.jsonl" > "$out/prompts.jsonl"
    run 000_demo_data.answer --prompts "$out/prompts.jsonl" --out "$out/chats.jsonl" --max-new-tokens 12 --batch-size 5
else
    run 000_demo_data.answer --prompts "$demo/train_prompts.jsonl" --out "$demo/chats.jsonl"
fi
