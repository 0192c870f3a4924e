#!/usr/bin/env bash
# Memory, exchanges and cycles of an 8B target's stages, as the compilers for TPUs give them: no TPU, twenty minutes on
# one core. It needs libtpu: PYTHON=.venv-aot/bin/python after `make aot`. With GPUS=1 and CUDA's compiler (pip install
# 'jsfdd[cuda]') the GPUs' stages, in two minutes. SMOKE=1: two programs of a toy's width, no file.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
export JAX_PLATFORMS=cpu
if [[ ${SMOKE:-} ]]; then
    run 027_aot.by_length --smoke
    exit
fi
run 027_aot.by_length ${GPUS:+--gpus} --results "$root/experiments/027_aot/results.jsonl"
