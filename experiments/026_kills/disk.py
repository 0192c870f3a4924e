"""Every stage on a file system that is too small, or that refuses to write; then the same command with room.

    python disk.py WORK                                                       a line of JSON a case

A full disk is a tmpfs, mounted in a name space of its own (`unshare --map-root-user --mount`). A spent quota and a broken disk
are a library (`refusing.c`) between the process and the system, so that Orbax's and safetensors' own writes fail, too.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

stages = importlib.import_module("experiments.026_kills.stages")

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of what the stage needs
KINDS = ("ENOSPC", "EDQUOT", "EIO")
FULL = """
mount -t tmpfs -o size={size} tmpfs {out}
{command} > {case}/out.1 2> {case}/err.1; echo $?
find {out} -name '*.tmp' -o -name '*orbax-checkpoint-tmp' -o -name '*.partial' -o -name '*.lock' | wc -l
mount -o remount,size=1g {out}
{command} > {case}/out.2 2> {case}/err.2; echo $?
cp -r {out}/. {copy}
"""
REFUSING = """
export REFUSE_BELOW={out} REFUSE_AFTER={size} REFUSE_WITH={number}
LD_PRELOAD={library} {command} > {case}/out.1 2> {case}/err.1; echo $?
find {out} -name '*.tmp' -o -name '*orbax-checkpoint-tmp' -o -name '*.partial' -o -name '*.lock' | wc -l
{command} > {case}/out.2 2> {case}/err.2; echo $?
cp -r {out}/. {copy}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stages", nargs="+", default=[*stages.STAGES, "keep"])
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    work = options.work.resolve()
    with contextlib.redirect_stdout(sys.stderr):
        stages.make_inputs(work / "inputs")
    library = work / "refusing.so"
    source = Path(__file__).with_name("refusing.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    for stage in options.stages:
        reference = work / "whole" / stage
        if not (reference / "whole").exists():
            shutil.rmtree(reference, ignore_errors=True)
            reference.mkdir(parents=True)
            _run(stages.command(stage, work / "inputs", reference))
            (reference / "whole").touch()
        expected = stages.result(stage, reference)
        files = [path.stat().st_size for path in reference.rglob("*") if path.is_file()]
        for kind in options.kinds:
            # Of a tmpfs each file takes whole pages.
            size = sum(-(-size // 4096) * 4096 if kind == "ENOSPC" else size for size in files)
            for share in options.shares:
                value = _case(stage, kind, work, library, int(share * size), expected)
                print(json.dumps({"at": [kind, f"{stage} {share}"], "value": value}), flush=True)


def _run(words: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "jsfdd.commands.cli", *words], check=True, capture_output=True)


def _case(stage: str, kind: str, work: Path, library: Path, size: int, expected: dict) -> dict:
    case = work / f"case {stage}".replace(" ", "-")
    out, copy = case / "out", case / "copy"
    shutil.rmtree(case, ignore_errors=True)
    out.mkdir(parents=True)
    copy.mkdir()
    words = [sys.executable, "-m", "jsfdd.commands.cli", *stages.command(stage, work / "inputs", out)]
    command = " ".join(f"'{word}'" for word in words)
    places = {"size": size, "out": out, "case": case, "copy": copy, "command": command}
    if kind == "ENOSPC":
        shell = ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL.format(**places)]
    else:
        shell = ["sh", "-c", REFUSING.format(**places, library=library, number=getattr(errno, kind))]
    process = subprocess.run(shell, capture_output=True, text=True, check=True)
    first, left, second = map(int, process.stdout.split())
    errors = (case / "err.1").read_text()
    lines = [line for line in errors.splitlines() if line.startswith("jsfdd: error")]
    return {
        "bytes": size,
        "first": first,
        "message": lines[-1].replace(str(out), "OUT") if lines else errors[-300:],
        "one_line": len(lines) == 1 and os.strerror(getattr(errno, kind)).lower() in lines[0] and " free; " in lines[0],
        "traceback": "Traceback" in errors,
        "left_open": left,
        "second": second,
        "same": stages.result(stage, copy) == expected,
        "left_over": stages.left_over(copy),
    }


if __name__ == "__main__":
    main()
