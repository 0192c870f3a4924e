#!/usr/bin/env bash
# The whole comparison: RUN VLLM_PYTHON WORK. RUN is a training run's directory (demo-run/arms/full), VLLM_PYTHON the interpreter
# that has vLLM, WORK a directory for what is exported and answered. See README.md for how to install vLLM.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 3 "RUN VLLM_PYTHON WORK" "$@"
here=$root/experiments/005_vllm
mkdir -p "$3"
[[ -d $3/target ]] || run 005_vllm.write_target "$3/target"
[[ -d $3/draft ]] || jsfdd export --draft "$1" --flavour vllm --out "$3/draft"
[[ -f $3/ours.json ]] || run 005_vllm.ours --draft "$3/draft" --prompts "$root/jsfdd/data/demo/eval_prompts.jsonl" --out "$3/ours.json"
# Two cores that are shared: a second thread would mostly wait for the first.
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
"$2" "$here/served.py" --target "$3/target" --draft "$3/draft" --ours "$3/ours.json" --out "$3/served.json"
"$2" "$here/served.py" --target "$3/target" --ours "$3/ours.json" --out "$3/served_plain.json"
run 005_vllm.compare "$3" "$here/results.json"
