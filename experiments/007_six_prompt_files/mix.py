"""The conversations that the draft is trained on, the first of five files in FOLDER: python mix.py FOLDER OUT.jsonl"""

import gzip
import sys
from pathlib import Path

COUNTS = {"chat_sharegpt": 650, "math_gsm8k": 500, "code_instruct": 400, "instruct_roleplay": 200, "math_aqua": 100}

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
with out.open("w", encoding="utf-8") as stream:
    for name, count in COUNTS.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as rows:
            stream.writelines(row for _, row in zip(range(count), rows))
