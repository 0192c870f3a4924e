#!/usr/bin/env bash
# τ of one draft on six benchmarks, as a chain of 4, a chain of 7 and a tree of 60: DRAFT FOLDER OUT [PROMPTS A BENCHMARK]
# SMOKE=1: one prompt each and 8 tokens.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "DRAFT FOLDER OUT [PROMPTS A BENCHMARK]" "$@"
draft=$1 folder=$2 out=$3 count=${4:-10} new_tokens=64
if [[ ${SMOKE:-} ]]; then count=1 new_tokens=8; fi
run 007_six_prompt_files.prompts "$folder" "$out/prompts" "$count"
measure() {
    jsfdd evaluate --target smollm2 --draft "$draft" --prompts "$out"/prompts/*.jsonl --max-new-tokens "$new_tokens" \
        --batch-size 5 --out "$out/$1" "${@:2}"
}
measure chain-4 --num-draft-tokens 4
measure chain-7 --num-draft-tokens 7
measure tree-60 --num-draft-tokens 7 --tree-nodes 60
