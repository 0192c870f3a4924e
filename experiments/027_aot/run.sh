#!/usr/bin/env bash
# Memory and exchanges of an 8B target's stages by length, as libtpu's compiler gives them; twenty minutes on one core, no TPU.
# It needs libtpu: PYTHON=.venv-aot/bin/python after `make aot`. SMOKE=1: one length of a toy's width, no file.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
export JAX_PLATFORMS=cpu
if [[ ${SMOKE:-} ]]; then
    run 027_aot.by_length --smoke
    exit
fi
run 027_aot.by_length --results "$root/experiments/027_aot/results.jsonl"
