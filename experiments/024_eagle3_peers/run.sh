#!/usr/bin/env bash
# EAGLE-3 drafts in the peers' own classes, and in vLLM: DRAFT EAGLE_PYTHON EAGLE_CHECKOUT VLLM_PYTHON WORK
# DRAFT is a trained EAGLE-3 draft. See README.md for what the two interpreters have installed. SMOKE=1 takes one conversation,
# and four prompts.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
SMOKE=${SMOKE:-0}
need 5 "DRAFT EAGLE_PYTHON EAGLE_CHECKOUT VLLM_PYTHON WORK" "$@"
here=$root/experiments/024_eagle3_peers
served=$root/experiments/005_vllm/served.py
prompts=$root/jsfdd/data/demo/eval_prompts.jsonl
work=$5
mkdir -p "$work"
[[ -d $work/target ]] || run 005_vllm.write_target "$work/target"
[[ -f $work/index.json ]] || run 024_eagle3_peers.ours "$work/target" "$work" "$1"
# Two cores that are shared: a second thread would mostly wait for the first.
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
"$2" "$here/peers.py" "$work" "$work/target" "$work/eagle.json" eagle "$3"
"$4" "$here/peers.py" "$work" "$work/target" "$work/speculators.json" speculators
for flavour in vllm speculators; do
    part=$work/$flavour
    mkdir -p "$part"
    [[ -d $part/draft ]] || jsfdd export --draft "$1" --flavour "$flavour" --target "$work/target" --out "$part/draft"
    [[ -f $part/ours.json ]] || run 005_vllm.ours --draft "$part/draft" --prompts "$prompts" --count $((SMOKE ? 4 : 24)) --out "$part/ours.json"
    "$4" "$served" --target "$work/target" --draft "$part/draft" --ours "$part/ours.json" --out "$part/served.json"
    run 005_vllm.compare "$part" "$part/results.json"
done
run 024_eagle3_peers.gather "$work" "$here/results.jsonl"
