#!/usr/bin/env bash
# One training step, ours and PyTorch's, turn about: TORCH_PYTHON. SMOKE=1: a toy shape, nothing written.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 1 "TORCH_PYTHON" "$@"
TORCH_PYTHON=$1 run 010_training_step.compare
