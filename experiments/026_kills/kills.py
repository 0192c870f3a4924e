"""SIGKILL at any moment of any stage, again and again, until it ends: the same result to the bit as undisturbed.

python -m experiments.026_kills.kills WORK --kills 100                       a line of JSON a stage and round
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import time
from pathlib import Path

stages = importlib.import_module("experiments.026_kills.stages")


def main() -> None:
    from children import Child

    from jsfdd.commands.cli import main as jsfdd

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work, rng = options.work.resolve(), random.Random(options.seed)
    if not (work / "inputs" / "draft" / "checkpoints").exists():
        Child(stages.make_inputs, work / "inputs", devices=1).finish()

    def begin(stage: str, out: Path) -> Child:
        return Child(jsfdd, stages.command(stage, work / "inputs", out), devices=1)

    expected, seconds = {}, {}
    for stage in stages.STAGES:
        out = work / "whole" / stage
        for _ in range(2):  # the second time as fast as it will be from now on
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            start = time.monotonic()
            code, _, errors = begin(stage, out).finish()
            assert code == 0, errors
            seconds[stage] = time.monotonic() - start
        expected[stage] = stages.result(stage, out)

    kills = number = 0
    while kills < options.kills:
        number += 1
        for stage in stages.STAGES:
            out, kills_here, code = work / "killed" / stage, 0, None
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            while code is None:
                child, limit = begin(stage, out), rng.uniform(0.1, 1.0) * seconds[stage]
                end = time.monotonic() + limit
                while child.running and time.monotonic() < end:
                    time.sleep(0.005)
                if child.running and kills_here < 6:  # then it may end
                    child.kill()
                    child.finish()
                    kills_here += 1
                    continue
                code, _, errors = child.finish()
            kills += kills_here
            value = {"kills": kills_here, "code": code, "same": code == 0 and stages.result(stage, out) == expected[stage]}
            value["left_over"] = stages.left_over(out)
            if code:
                value["error"] = errors[-300:]
            print(json.dumps({"at": ["kills", f"{stage} {number}"], "value": value}), flush=True)
    print(json.dumps({"at": ["total"], "value": {"kills": kills}}))


if __name__ == "__main__":
    main()
