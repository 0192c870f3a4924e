#!/usr/bin/env bash
# What a draft training step costs on top of its products; four minutes. SMOKE=1: a toy shape, nothing written.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
run 002_draft_step.bench "$@"
