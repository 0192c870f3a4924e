"""SIGKILL at any moment of any stage, again and again, until it ends: the same result to the bit as undisturbed.

python -m experiments.026_kills.kills WORK --kills 100                       a line of JSON a stage and round

WORK/kills.jsonl has the lines too, so that the same command goes on where it was stopped; it prints the earlier ones again.
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

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = options.work.resolve()
    if not (work / "inputs" / "draft" / "checkpoints").exists():
        Child(stages.make_inputs, work / "inputs", devices=1).finish()
    whole = {stage: _undisturbed(stage, work) for stage in stages.STAGES}
    log = work / "kills.jsonl"
    earlier = log.read_text() if log.exists() else ""
    print(earlier, end="", flush=True)
    lines = [json.loads(line) for line in earlier.splitlines()]
    done = {line["at"][1] for line in lines}
    kills, number = sum(line["value"]["kills"] for line in lines), 0
    while kills < options.kills:
        number += 1
        for stage in stages.STAGES:
            if f"{stage} {number}" in done:
                continue
            value = _round(stage, work, *whole[stage], random.Random(f"{options.seed} {stage} {number}"))
            kills += value["kills"]
            line = json.dumps({"at": ["kills", f"{stage} {number}"], "value": value})
            with log.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
    print(json.dumps({"at": ["total"], "value": {"kills": kills}}))


def _begin(stage: str, work: Path, out: Path):
    from children import Child

    from jsfdd.commands.cli import main as jsfdd

    return Child(jsfdd, stages.command(stage, work / "inputs", out), devices=1)


def _undisturbed(stage: str, work: Path) -> tuple[dict, float]:
    """(the stage's result, seconds that it takes)."""
    out, timed = work / "whole" / stage, work / "whole" / f"{stage}.seconds"
    if not timed.exists():
        for _ in range(2):  # the second time as fast as it will be from now on
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            start = time.monotonic()
            code, _, errors = _begin(stage, work, out).finish()
            assert code == 0, errors
        timed.write_text(str(time.monotonic() - start))
    return stages.result(stage, out), float(timed.read_text())


def _round(stage: str, work: Path, expected: dict, seconds: float, rng: random.Random) -> dict:
    out, kills, code = work / "killed" / stage, 0, None
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    while code is None:
        child, limit = _begin(stage, work, out), rng.uniform(0.1, 1.0) * seconds
        end = time.monotonic() + limit
        while child.running and time.monotonic() < end:
            time.sleep(0.005)
        if child.running and kills < 6:  # then it may end
            child.kill()
            child.finish()
            kills += 1
            continue
        code, _, errors = child.finish()
    # A second export says the same of a draft that is there, killed or not.
    ended = code == 0 or stage == "export" and kills > 0 and code == 2 and "already there" in errors
    value = {"kills": kills, "code": code, "same": ended and stages.result(stage, out) == expected}
    value["left_over"] = stages.left_over(out)
    if code:
        value["error"] = errors[-300:]
    return value


if __name__ == "__main__":
    main()
