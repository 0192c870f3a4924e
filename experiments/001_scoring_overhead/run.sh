#!/usr/bin/env bash
# What scoring costs on top of the target; ten minutes. Options go to bench.py. SMOKE=1: a tiny random model.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
run 001_scoring_overhead.bench "$@"
