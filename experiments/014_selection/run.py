"""Train and judge the arms of some plans, one after the other; stopped, it goes on where it was. See README.md."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from arms import arms
from pool import TEMPERATURES, open_pool, pick_prompts, run_arm

PROMPTS = {"mt_bench": 40, "gsm8k": 40, "alpaca": 40, "sum": 10, "qa": 40}

SAMPLED_TOO = ("table", "steps")  # the paper's tables 1 and 4; the rest is judged at temperature 0 alone


def main() -> None:
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="chats, best with the target's own answers")
    parser.add_argument("--prompts", type=Path, required=True, help="folder with " + ", ".join(f"{n}.jsonl" for n in PROMPTS))
    parser.add_argument("--work", type=Path, required=True, help="directory for all that is computed; continued")
    parser.add_argument("--plans", nargs="+", default=["table"], help="table, steps, ratios, controls, better")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=1 if smoke else 4)
    options = parser.parse_args()
    prompts = pick_prompts(options.prompts, {"gsm8k": 2, "qa": 2} if smoke else PROMPTS)
    pool = open_pool(
        options.data, prompts, options.work, draft_vocab=8192, epochs=options.epochs, max_new_tokens=8 if smoke else 48
    )
    for plan in options.plans:
        for name, arm in arms(pool, plan, options.seeds).items():
            run_arm(pool, name, arm, TEMPERATURES if plan in SAMPLED_TOO else TEMPERATURES[:1])


if __name__ == "__main__":
    main()
