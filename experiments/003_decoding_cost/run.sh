#!/usr/bin/env bash
# The cost of a verification, other ways to write the products, and plain decoding beside transformers: [TORCH_PYTHON WORK]
# TORCH_PYTHON has torch and transformers; without it the comparison is left out. SMOKE=1: shorter, nothing written.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
run 003_decoding_cost.rows
run 003_decoding_cost.trials
if (($# >= 2)); then
    [[ -d $2/target ]] || run 005_vllm.write_target "$2/target"
    "$1" "$root/experiments/003_decoding_cost/libraries.py"
    run 003_decoding_cost.compare --torch-python "$1" --model "$2/target"
fi
