#!/usr/bin/env bash
# Answers the demo's training prompts with SmolLM2. SMOKE=1: ten prompts, into a temporary directory.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
demo=jsfdd/data/demo
if [ -n "${SMOKE:-}" ]; then
  out=$(mktemp -d)
  head -n 10 "$demo/train_prompts.jsonl" > "$out/prompts.jsonl"
  exec "$python" experiments/000_demo_data/answer.py --prompts "$out/prompts.jsonl" --out "$out/chats.jsonl" \
    --max-new-tokens 12 --batch-size 5
fi
exec "$python" experiments/000_demo_data/answer.py --prompts "$demo/train_prompts.jsonl" --out "$demo/chats.jsonl"
