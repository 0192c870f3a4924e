"""Two processes of one run, of which one is killed, or whose disk is full: when does the other one end, and what is left?

    python pair.py WORK                                                       a line of JSON a case

A full disk is a tmpfs in a name space of its own, in which this script starts itself again (`unshare`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from jsfdd.base.files import read_json, write_json

stages = importlib.import_module("experiments.026_kills.stages")

CASES = ("kill 0", "kill 1", "full 0.3", "full 0.7")
LIMIT = 240  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stages", nargs="+", default=["score", "train"])
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--inside", type=Path, help="for the script's own use: a case's settings")
    options = parser.parse_args()
    work = options.work.resolve()
    if options.inside:
        _full(read_json(options.inside))
        return
    for stage in options.stages:
        reference = work / "whole of two" / stage
        if not (reference / "whole").exists():
            shutil.rmtree(reference, ignore_errors=True)
            reference.mkdir(parents=True)
            assert _end(_begin(stage, work, reference))["codes"] == [0, 0]
            (reference / "whole").touch()
        expected = stages.result(stage, reference)
        for case in options.cases:
            value = _case(stage, case, work, reference)
            copy = work / "pair" / "copy"
            value |= {"same": stages.result(stage, copy) == expected, "left_over": stages.left_over(copy)}
            print(json.dumps({"at": ["pair", f"{stage}, {case}"], "value": value}), flush=True)


def _case(stage: str, case: str, work: Path, reference: Path) -> dict:
    place, (kind, number) = work / "pair", case.split()
    shutil.rmtree(place, ignore_errors=True)
    out, copy = place / "out", place / "copy"
    out.mkdir(parents=True)
    if kind == "kill":
        processes = _begin(stage, work, out)
        said, begin = out.parent / f"{out.name}.err.0", time.monotonic()
        while f"\n{stage}: " not in said.read_text() and time.monotonic() < begin + LIMIT:  # it works
            time.sleep(0.02)
        processes[int(number)].kill()
        value = _end(processes) | _messages(out)
        value["again"] = _end(_begin(stage, work, out))["codes"]
        shutil.copytree(out, copy)
        return value
    pages = sum(-(-path.stat().st_size // 4096) * 4096 for path in reference.rglob("*") if path.is_file())
    settings = {"stage": stage, "work": str(work), "bytes": int(float(number) * pages)}
    write_json(place / "settings.json", settings)
    words = [sys.executable, "-m", "experiments.026_kills.pair", str(work), "--inside", str(place / "settings.json")]
    subprocess.run(["unshare", "--map-root-user", "--mount", *words], check=True)
    return read_json(place / "value.json")


def _full(settings: dict) -> None:
    stage, work = settings["stage"], Path(settings["work"])
    place, out = work / "pair", work / "pair" / "out"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={settings['bytes']}", "tmpfs", out], check=True)
    value = _end(_begin(stage, work, out)) | _messages(out)
    subprocess.run(["mount", "-o", "remount,size=1g", out], check=True)
    value["again"] = _end(_begin(stage, work, out))["codes"]
    shutil.copytree(out, place / "copy")
    write_json(place / "value.json", value)


def _begin(stage: str, work: Path, out: Path) -> list[subprocess.Popen]:
    # The test tools' folder is on the path (run.sh).
    from children import free_port

    words = stages.command(stage, work / "inputs", out)
    if stage == "score":  # samples are dropped from a store by one process alone
        words = [*words[: words.index("--keep-hidden")], *words[words.index("--out") :]]
    shared = [sys.executable, "-m", "jsfdd.commands.cli", *words, "--coordinator", f"127.0.0.1:{free_port()}"]
    texts = [open(out.parent / f"{out.name}.err.{number}", "w") for number in range(2)]  # noqa: SIM115
    return [
        subprocess.Popen(
            [*shared, "--num-processes", "2", "--process-id", str(number)], stdout=subprocess.DEVNULL, stderr=texts[number]
        )
        for number in range(2)
    ]


def _messages(out: Path) -> dict:
    """What the two processes said at their ends, and how many open parts they left."""
    texts = [(out.parent / f"{out.name}.err.{number}").read_text(errors="replace") for number in range(2)]
    last = [next((line for line in text.splitlines() if line.startswith("jsfdd: error")), text[-200:]) for text in texts]
    return {
        "said": [line.replace(str(out), "OUT")[:160] for line in last],
        "traceback": any("Traceback" in text for text in texts),
        "left_open": len(stages.left_over(out)),
    }


def _end(processes: list[subprocess.Popen]) -> dict:
    """Exit codes, the seconds between the two ends, and which process ended first; after LIMIT both are killed."""
    ended: dict[int, float] = {}
    start = time.monotonic()
    while len(ended) < 2:
        for number, process in enumerate(processes):
            if number not in ended and process.poll() is not None:
                ended[number] = time.monotonic()
        if time.monotonic() > start + LIMIT:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return {
        "codes": [process.returncode for process in processes],
        "seconds_between": round(abs(ended[0] - ended[1]), 1),
        "first": min(ended, key=ended.get),
    }


if __name__ == "__main__":
    main()
