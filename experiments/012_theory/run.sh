#!/usr/bin/env bash
# The theory, then one step from two real drafts: ON_POLICY.jsonl OFF_POLICY_FOLDER WORK; stopped, it goes on in WORK.
# SMOKE=1: one draft of three steps, five chats.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "ON_POLICY.jsonl OFF_POLICY_FOLDER WORK" "$@"
on=$1 off=$2 work=$3
mkdir -p "$work"
train() { # NAME and options; trains on WORK/NAME.jsonl
    jsfdd train --target smollm2 --data "$work/$1.jsonl" --max-length 384 --batch-tokens 1024 --learning-rate 1e-3 \
        --out "$work/$1" "${@:2}"
}
measure() { # NAME and options; on WORK/NAME-text.jsonl
    run 012_theory.real --name "$1 draft" --draft "$work/$1" --work "$work/$1-columns" --on-policy "$work/$1-text.jsonl" \
        --off-policy "$off"/{chat_sharegpt,math_gsm8k,code_instruct,instruct_roleplay,math_aqua}.jsonl.gz "${@:2}"
}
run 012_theory.families
tail -n +151 "$on" > "$work/early-text.jsonl"
if [[ ${SMOKE:-} ]]; then
    head -n 6 "$on" > "$work/early.jsonl"
    train early --epochs 1
    measure early
    exit
fi
head -n 150 "$on" > "$work/early.jsonl"
train early --epochs 2
measure early
grep '"source": "math_' "$on" | head -n 140 > "$work/maths.jsonl"
grep -vxF -f "$work/maths.jsonl" "$work/early-text.jsonl" > "$work/maths-text.jsonl"
train maths --epochs 4 --draft-vocab 8192
measure maths --tokens 45
