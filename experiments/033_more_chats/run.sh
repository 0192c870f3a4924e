#!/usr/bin/env bash
# Halves of ten times as many chats as 023's, on the answers of 031: WORK_OF_031 EVAL_FOLDER WORK. What is done is not repeated.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "WORK_OF_031 EVAL_FOLDER WORK" "$@"
made=$1 eval=$2 work=$3
mkdir -p "$work"/{flatness,random}
scores=$made/answers/scores.parquet
[[ -s $work/flatness/selection.json ]] ||
    jsfdd select --scores "$scores" --retain-ratio 0.5 --within cluster --out "$work/flatness"
[[ -s $work/random/selection.json ]] ||
    jsfdd select --scores "$scores" --retain-ratio 0.5 --metric random --out "$work/random"
learn=(jsfdd train --target smollm2 --data "$made/answers/a.jsonl" --hidden-from "$made/answers/hidden"
    --max-length 512 --batch-tokens 512 --draft-vocab 8192 --learning-rate 1e-3)
for arm in flatness random; do
    "${learn[@]}" --epochs 12 --selection "$work/$arm/selection.json" --out "$work/${arm}_12"
done
"${learn[@]}" --epochs 6 --out "$work/all_6"
run 031_packaged_draft.judge --prompts "$eval" --work "$made" --results "$root/experiments/033_more_chats/results.jsonl" \
    "all, 12 epochs=$made/eagle" "flattest half of every cluster, 12 epochs=$work/flatness_12" \
    "random half, 12 epochs=$work/random_12" "all, 6 epochs=$work/all_6"
