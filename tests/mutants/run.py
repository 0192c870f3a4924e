"""Plant the faults of mutants.toml one at a time and see whether the test that each one names falls.

    python tests/mutants/run.py                       all of them; exit code 1 if a test misses its fault
    python tests/mutants/run.py rope tree             those whose names hold one of these words
    python tests/mutants/run.py --tree DIR --then     in another checkout, by the files and tests of that time (`then`)

The faults go into a temporary copy. The named tests run there without a fault first: a test that falls anyway proves
nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COPIED = ("jsfdd", "tests", "pyproject.toml")
FELL, PASSED = 1, 0  # pytest's exit codes; others mean that it did not get as far as the test


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One planted fault.

    Attributes:
      name: says what is wrong.
      file: path from the repository's root.
      old, new: text that occurs once in the file, and what takes its place.
      test: id of the test that must fall.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


def read_mutants(path: Path = HERE / "mutants.toml", *, then: bool = False) -> list[Mutant]:
    """The list; with `then`, those that commit 678103e could have as well, by the files and tests it had."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    if then:
        rows = [row | row["then"] for row in rows if "then" in row]
    return [Mutant(**{field.name: row[field.name] for field in dataclasses.fields(Mutant)}) for row in rows]


def planted(root: Path, mutant: Mutant) -> str:
    """The file's text with the fault. ValueError: the old text does not occur exactly once."""
    text = (root / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has the old text {text.count(mutant.old)} times, not once")
    return text.replace(mutant.old, mutant.new)


def run_tests(copy: Path, *tests: str) -> tuple[int, str]:
    """(exit code, output) of pytest in a copy."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def make_copy(root: Path, copy: Path) -> Path:
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            copy.mkdir(exist_ok=True)
            shutil.copy2(source, copy / name)
    return copy


def examine(copies: queue.Queue, mutant: Mutant) -> str:
    """What became of one mutant: "fell", or what went wrong. Borrows one of the copies."""
    copy = copies.get()
    path = copy / mutant.file
    original = path.read_text(encoding="utf-8")
    try:
        path.write_text(planted(copy, mutant), encoding="utf-8")
        code, output = run_tests(copy, mutant.test)
    except (ValueError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        path.write_text(original, encoding="utf-8")
        copies.put(copy)
    if code == FELL:
        return "fell"
    return "PASSED: the test does not see the fault" if code == PASSED else f"exit code {code}: {output[-500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose names hold one of these words")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to take package and tests from")
    parser.add_argument("--then", action="store_true", help="files and tests as they were at commit 678103e")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    mutants = read_mutants(then=arguments.then)
    if arguments.words:
        mutants = [mutant for mutant in mutants if any(word in mutant.name for word in arguments.words)]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue = queue.Queue()
        for number in range(arguments.processes):
            copies.put(make_copy(arguments.tree, Path(folder) / str(number)))
        copy = copies.get()
        code, output = run_tests(copy, *dict.fromkeys(mutant.test for mutant in mutants))
        copies.put(copy)
        if code != PASSED:
            print(f"the named tests do not pass without a fault:\n{output[-3000:]}")
            return 1
        with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
            ends = list(pool.map(lambda mutant: examine(copies, mutant), mutants))
    for mutant, end in zip(mutants, ends):
        print(f"{mutant.name:48} {end:8} {mutant.test}")
    fallen = sum(end == "fell" for end in ends)
    print(f"{fallen} of {len(mutants)} faults were found, in {time.monotonic() - begin:.0f} s")
    return 0 if fallen == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
