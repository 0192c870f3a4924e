#!/usr/bin/env bash
# EAGLE-3 drafts in the peers' own classes, and in vLLM: DRAFT VLLM_PYTHON TRANSFORMERS4_PYTHON EAGLE TPU_INFERENCE SGLANG_JAX WORK
# DRAFT is a trained EAGLE-3 draft, EAGLE and SGLANG_JAX are checkouts, TPU_INFERENCE is an unpacked wheel. See README.md for what
# the two interpreters have installed. SMOKE=1 takes one conversation and four prompts.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 7 "DRAFT VLLM_PYTHON TRANSFORMERS4_PYTHON EAGLE TPU_INFERENCE SGLANG_JAX WORK" "$@"
draft=$1 vllm=$2 four=$3 eagle=$4 tpu=$5 sgl=$6 work=$7
here=$root/experiments/024_eagle3_peers
served=$root/experiments/005_vllm/served.py
prompts=$root/jsfdd/data/demo/eval_prompts.jsonl
count=24
[[ ${SMOKE:-0} == 1 ]] && count=4
mkdir -p "$work"
[[ -d $work/target ]] || run 005_vllm.write_target "$work/target"
[[ -f $work/index.json ]] || run 024_eagle3_peers.ours "$work/target" "$work" "$draft"
# Two cores that are shared: a second thread would mostly wait for the first.
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind JAX_PLATFORMS=cpu
"$four" "$here/peers.py" "$work" "$work/target" "$work/eagle.json" eagle "$eagle"
"$vllm" "$here/peers.py" "$work" "$work/target" "$work/speculators.json" speculators
PYTHONPATH=$tpu "$vllm" "$here/jax_peers.py" "$work" "$work/target" "$work/tpu-inference.json" tpu-inference
PYTHONPATH=$sgl/python "$four" "$here/jax_peers.py" "$work" "$work/target" "$work/sglang-jax.json" sglang-jax
for flavour in vllm speculators; do
    [[ -d $work/$flavour/draft ]] || jsfdd export --draft "$draft" --flavour $flavour --target "$work/target" --out "$work/$flavour/draft"
done
ours=$work/vllm/ours.json
[[ -f $ours ]] || run 005_vllm.ours --draft "$work/vllm/draft" --prompts "$prompts" --count $count --out "$ours"
cp "$ours" "$work/speculators/ours.json" # the same draft
for flavour in vllm speculators; do
    part=$work/$flavour
    "$vllm" "$served" --target "$work/target" --draft "$part/draft" --ours "$part/ours.json" --out "$part/served.json"
    run 005_vllm.compare "$part" "$part/results.json"
done
run 024_eagle3_peers.gather "$work" "$here/results.jsonl"
