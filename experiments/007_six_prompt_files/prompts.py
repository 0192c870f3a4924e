"""Take COUNT prompts, evenly spread, of each of six benchmarks in FOLDER; write OUT, a file a benchmark.

python prompts.py FOLDER OUT COUNT
"""

import json
import sys
from pathlib import Path

NAMES = ("mt_bench", "gsm8k", "alpaca", "sum", "qa", "humaneval")

folder, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)
for name in NAMES:
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    step = len(rows) / count
    # One source a benchmark: MT-bench's eight categories would each be too few to measure.
    chosen = [{"id": row["id"], "source": name, "turns": row["turns"]} for row in (rows[int(i * step)] for i in range(count))]
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
