#!/usr/bin/env bash
#SBATCH --job-name=jsfdd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
# Run a jsfdd stage on several GPU nodes, with one process per GPU, as JAX expects under SLURM.
#   sbatch tpu/slurm.sh STAGE OPTIONS…          tpu/slurm.sh --dry-run STAGE OPTIONS… prints the command
# JSFDD: the program (default: jsfdd in the environment of the submitting shell).
set -euo pipefail
dry_run=0
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
case "${1:-}" in
  respond | score | select | train | evaluate) ;;
  *) echo "usage: sbatch tpu/slurm.sh respond|score|select|train|evaluate OPTIONS…" >&2; exit 2 ;;
esac
set -- srun --kill-on-bad-exit=1 "${JSFDD:-jsfdd}" "$@" --coordinator auto
printf '%q ' "$@"
printf '\n'
if [ "$dry_run" = 0 ]; then exec "$@"; fi
