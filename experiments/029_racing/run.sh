#!/usr/bin/env bash
# How well do the first tokens of an answer, or its prompt, say whether the answer is worth finishing: CHATS.jsonl DIR.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 2 "CHATS.jsonl DIR" "$@"
[[ -f $2/answers.jsonl ]] || jsfdd respond --target smollm2 --data "$1" --turns first --max-new-tokens 96 --max-length 512 \
    --batch-size 64 --keep-hidden full --out "$2/answers.jsonl"
run 029_racing.tokens --answers "$2/answers.jsonl" --scores "$2/scores.parquet" --hidden "$2/hidden" --out "$2/tokens.npz"
run 029_racing.race "$2/tokens.npz" "$root/experiments/029_racing/results.jsonl"
