"""Every stage on a file system that is too small, at several sizes; then the same command with room.

    python disk.py WORK                                                       a line of JSON a case

Each case mounts a tmpfs in a name space of its own (`unshare --map-root-user --mount`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

stages = importlib.import_module("experiments.026_kills.stages")

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of what the stage needs
SCRIPT = """
mount -t tmpfs -o size={size} tmpfs {mount}
{command} > {mount}/../out.1 2> {mount}/../err.1; echo $?
find {mount} -name '*.tmp' -o -name '*orbax-checkpoint-tmp' -o -name '*.partial' -o -name '*.lock' | wc -l
mount -o remount,size=1g {mount}
{command} > {mount}/../out.2 2> {mount}/../err.2; echo $?
cp -r {mount}/. {copy}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stages", nargs="+", default=stages.STAGES)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    options = parser.parse_args()
    work = options.work.resolve()
    stages.make_inputs(work / "inputs")
    for stage in options.stages:
        reference = work / "whole" / stage
        shutil.rmtree(reference, ignore_errors=True)
        reference.mkdir(parents=True)
        _run(stages.command(stage, work / "inputs", reference))
        expected = stages.result(stage, reference)
        # Of a tmpfs each file takes whole pages.
        size = sum(-(-path.stat().st_size // 4096) * 4096 for path in reference.rglob("*") if path.is_file())
        for share in options.shares:
            value = _case(stage, work, int(share * size), expected)
            print(json.dumps({"at": ["disk", f"{stage} {share}"], "value": value}), flush=True)


def _run(words: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "jsfdd.commands.cli", *words], check=True, capture_output=True)


def _case(stage: str, work: Path, size: int, expected: dict) -> dict:
    mount, copy = work / "case" / "mount", work / "case" / "copy"
    shutil.rmtree(work / "case", ignore_errors=True)
    mount.mkdir(parents=True)
    copy.mkdir()
    words = [sys.executable, "-m", "jsfdd.commands.cli", *stages.command(stage, work / "inputs", mount)]
    command = " ".join(f"'{word}'" for word in words)
    script = SCRIPT.format(size=size, mount=mount, command=command, copy=copy)
    process = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True, check=True
    )
    first, left, second = map(int, process.stdout.split())
    errors = (work / "case" / "err.1").read_text()
    lines = [line for line in errors.splitlines() if line.startswith("jsfdd: error")]
    return {
        "bytes": size,
        "first": first,
        "message": lines[-1].replace(str(mount), "OUT") if lines else errors[-300:],
        "traceback": "Traceback" in errors,
        "left_open": left,
        "second": second,
        "same": stages.result(stage, copy) == expected,
        "left_over": stages.left_over(copy),
    }


if __name__ == "__main__":
    main()
