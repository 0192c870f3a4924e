"""The figures of one comparison as rows: WORK (as run.sh filled it) OUT.jsonl

python experiments/024_eagle3_peers/gather.py WORK experiments/024_eagle3_peers/results.jsonl
"""

import json
import sys
from pathlib import Path

from experiments.results import write_results


def main(work: Path, out: Path) -> None:
    results = {}
    for path in sorted(work.glob("*.json")):
        if path.name == "index.json":
            continue
        written = json.loads(path.read_text())
        rows = {}
        for row in written["rows"]:
            rows.setdefault(row.pop("case"), {})[str(row.pop("step", 1))] = row
        results[path.stem] = {"versions": written["versions"], "cases": rows}
    for path in sorted(work.glob("*/results.json")):
        results[f"vLLM, format {path.parent.name}"] = json.loads(path.read_text())
    write_results(out, results)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
