"""Train and judge the arms of some plans, one after the other; stopped, it goes on where it was. See README.md."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from arms import arms
from pool import open_pool, pick_prompts, run_arm

PROMPTS = {"mt_bench": 30, "gsm8k": 40, "alpaca": 40, "sum": 8, "qa": 40}


def main() -> None:
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="chats, best with the target's own answers")
    parser.add_argument("--prompts", type=Path, required=True, help="folder with " + ", ".join(f"{n}.jsonl" for n in PROMPTS))
    parser.add_argument("--work", type=Path, required=True, help="directory for all that is computed; continued")
    parser.add_argument("--plans", nargs="+", default=["table"], help="table, steps, ratios, controls, better")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0], help="to judge at; done arms are judged anew")
    parser.add_argument("--chats", type=int, default=16 if smoke else 430, help="how many of the data")
    parser.add_argument("--epochs", type=int, default=1 if smoke else 4)
    options = parser.parse_args()
    prompts = pick_prompts(options.prompts, {"gsm8k": 2, "qa": 2} if smoke else PROMPTS)
    pool = open_pool(
        options.data, prompts, options.work, draft_vocab=8192, epochs=options.epochs, max_new_tokens=8 if smoke else 48,
        temperatures=options.temperatures, chats=options.chats,
    )  # fmt: skip
    for plan in options.plans:
        for name, arm in arms(pool, plan, options.seeds).items():
            run_arm(pool, name, arm)


if __name__ == "__main__":
    main()
