#!/usr/bin/env bash
# Make the draft of SmolLM2 that comes with jsfdd: TRAIN_FOLDER EVAL_FOLDER WORK. What is done is continued, not repeated.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "TRAIN_FOLDER EVAL_FOLDER WORK" "$@"
train=$1 eval=$2 work=$3
mkdir -p "$work/answers"

# One pass of the target: its answers, their scores and its states.
[[ -s $work/prompts.jsonl ]] || "$python" -m experiments.pool.prompts "$train" > "$work/prompts.jsonl"
jsfdd respond --target smollm2 --data "$work/prompts.jsonl" --turns first --max-new-tokens 96 --max-length 512 \
    --batch-size 64 --keep-hidden full --out "$work/answers/a.jsonl"

# EAGLE's training, then HASS's three steps, in which the draft reads its own states as in decoding.
learn=(jsfdd train --target smollm2 --data "$work/answers/a.jsonl" --hidden-from "$work/answers/hidden"
    --max-length 512 --batch-tokens 512 --draft-vocab 8192)
"${learn[@]}" --epochs 12 --learning-rate 1e-3 --out "$work/eagle"
"${learn[@]}" --epochs 2 --learning-rate 5e-4 --draft-steps 3 --init "$work/eagle" --out "$work/hass"

# Measured, and written as it is packaged.
run 031_packaged_draft.judge --prompts "$eval" --work "$work" --whole-head \
    --results "$root/experiments/031_packaged_draft/results.jsonl" "EAGLE, 12 epochs=$work/eagle" "and HASS, 2 epochs=$work/hass"
run 031_packaged_draft.judge --prompts "$eval" --work "$work" --write "$work/few.jsonl"
measure=(jsfdd evaluate --target smollm2 --draft "$work/hass" --prompts "$work/few.jsonl" --max-new-tokens 64)
"${measure[@]}" --num-draft-tokens 4 --out "$work/chain"
"${measure[@]}" --num-draft-tokens 5 --tree-nodes 60 --out "$work/tree"
jsfdd export --draft "$work/hass" --report "$work/chain/report.json" "$work/tree/report.json" --export-dtype bfloat16 \
    --target HuggingFaceTB/SmolLM2-135M-Instruct --out "$work/smollm2-draft"
cat >> "$work/smollm2-draft/README.md" <<'CARD'

Made by one command, `experiments/031_packaged_draft/run.sh`: SmolLM2's own greedy answers to 2,436 first messages of ShareGPT, chitchat-dataset, OASST1,
dstc8-schema-guided-dialogue, GPTeacher (code and role play), GSM8K, AQuA, StrategyQA, QASC and CREAK; twelve epochs of EAGLE's training, then
the two of HASS's that the settings above are of. experiments/031_packaged_draft has τ on MT-bench, GSM8K, Alpaca, CNN/DailyMail and Natural Questions.
CARD
