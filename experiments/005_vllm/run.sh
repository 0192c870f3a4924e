#!/bin/sh
# The whole comparison: RUN is a training run's directory (demo-run/arms/full), VLLM_PYTHON the interpreter that has vLLM, WORK a
# directory for what is exported and answered. See README.md for how to install vLLM.
set -eu
if [ $# -ne 3 ]; then
  echo "usage: $0 RUN VLLM_PYTHON WORK" >&2
  exit 2
fi
here=$(dirname "$0")
mkdir -p "$3"
prompts=$(python -c 'import jsfdd.data.demo as d; print(d.__path__[0])')/eval_prompts.jsonl
[ -d "$3/target" ] || python "$here/write_target.py" "$3/target"
[ -d "$3/draft" ] || python -m jsfdd.commands.cli export --draft "$1" --flavour vllm --out "$3/draft"
[ -f "$3/ours.json" ] || python "$here/ours.py" --draft "$3/draft" --prompts "$prompts" --out "$3/ours.json"
# Two cores that are shared: a second thread would mostly wait for the first.
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
"$2" "$here/served.py" --target "$3/target" --draft "$3/draft" --ours "$3/ours.json" --out "$3/served.json"
"$2" "$here/served.py" --target "$3/target" --ours "$3/ours.json" --out "$3/served_plain.json"
python "$here/compare.py" "$3" "$here/results.json"
