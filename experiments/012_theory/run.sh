#!/usr/bin/env bash
# The theory alone, then one step on real distributions: ON_POLICY.jsonl OFF_POLICY_FOLDER WORK. SMOKE=1: one minute and a draft of 4 steps.
set -euo pipefail
on=$1 off=$2 work=$3
here=$(dirname "$0")
mkdir -p "$work"
train=150 epochs=2
if [[ ${SMOKE:-} ]]; then train=6 epochs=1; fi
head -n "$train" "$on" > "$work/train.jsonl"
tail -n +151 "$on" > "$work/rest.jsonl"
python "$here/families.py"
jsfdd train --target smollm2 --data "$work/train.jsonl" --max-length 384 --batch-tokens 1024 --epochs "$epochs" \
    --learning-rate 1e-3 --out "$work/draft"
python "$here/real.py" --draft "$work/draft" --on-policy "$work/rest.jsonl" --work "$work" --off-policy \
    "$off"/{chat_sharegpt,math_gsm8k,code_instruct,instruct_roleplay,math_aqua}.jsonl.gz
