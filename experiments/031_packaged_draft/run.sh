#!/usr/bin/env bash
# Make the packaged draft of SmolLM2: TRAIN_FOLDER EVAL_FOLDER WORK. Everything is continued; nothing is made twice.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "TRAIN_FOLDER EVAL_FOLDER WORK" "$@"
train=$1 eval=$2 work=$3
mkdir -p "$work/answers"

# One pass of the target: its answers, their scores and its states.
[[ -s $work/prompts.jsonl ]] || "$python" -m experiments.pool.prompts "$train" > "$work/prompts.jsonl"
[[ -s $work/answers/a.jsonl && ! -e $work/answers/a.jsonl.parts ]] ||
    jsfdd respond --target smollm2 --data "$work/prompts.jsonl" --turns first --max-new-tokens 96 --max-length 512 \
        --batch-size 64 --keep-hidden full --out "$work/answers/a.jsonl"

# EAGLE's training, then HASS's three steps, in which the draft reads its own states as in decoding.
learn=(jsfdd train --target smollm2 --data "$work/answers/a.jsonl" --hidden-from "$work/answers/hidden"
    --max-length 512 --batch-tokens 512 --draft-vocab 8192)
"${learn[@]}" --epochs 12 --learning-rate 1e-3 --out "$work/eagle"
"${learn[@]}" --epochs 4 --learning-rate 5e-4 --draft-steps 3 --init "$work/eagle" --out "$work/hass"
