"""Write the prompts of an answered pool: first questions of chats, so many of each file of a folder, in a random order.

python -m experiments.pool.prompts FOLDER > prompts.jsonl      FOLDER holds NAME.jsonl.gz, chats as `jsfdd score` reads them
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

PROMPTS = {
    "chat_chitchat": 150, "chat_oasst": 200, "chat_sgd": 100, "chat_sharegpt": 500, "code_instruct": 350,
    "instruct_roleplay": 250, "math_aqua": 200, "math_gsm8k": 400, "reasoning_cot": 350,
}  # fmt: skip
SHORTEST, LONGEST = 12, 900  # characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    chance, chosen = random.Random(0), []
    for name, number in PROMPTS.items():
        questions: dict[str, dict] = {}
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                text = next((turn["content"] for turn in row["messages"] if turn["role"] == "user"), None)
                if isinstance(text, str) and SHORTEST <= len(text) <= LONGEST and text not in questions:
                    message = {"role": "user", "content": text}
                    questions[text] = {"id": row["id"], "source": name, "messages": [message]}
        rows = list(questions.values())
        chance.shuffle(rows)
        chosen += rows[:number]
    chance.shuffle(chosen)
    for row in chosen:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
