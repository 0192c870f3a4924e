"""Hostile files of every family: a clean error that names the file, or the same content; never another exception.

    pytest tests/fuzz                          a few hundred cases a family, the same each time
    FUZZ_SECONDS=3600 pytest tests/fuzz        that long, with other cases each time (`make fuzz`)

A case is a family and a seed; a failure says both, and `mutated(seed_bytes, seed)` makes its file again.
"""

import dataclasses
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fuzz.mutations import mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_scoring_table import make_table
from toy import CHATML, toy_config, toy_draft, toy_tokenizer, write_chats, write_prompts, write_target

from jsfdd.data.chat import read_chat_files, read_prompts
from jsfdd.data.render import RefusedByTemplate, check_tokenizer, render
from jsfdd.decoding.conversation_log import AnsweredBatch, append_batch, open_log, read_log
from jsfdd.hidden.store import HiddenStore
from jsfdd.hidden.writer import HiddenWriter
from jsfdd.scoring.table import read_scores, read_token_scores, write_scores, write_token_scores
from jsfdd.selection.sfdd import read_selection, select, write_selection
from jsfdd.training.journal import METRICS, Journal, read_lines, read_metrics
from jsfdd.weights.card import read_report
from jsfdd.weights.export import write_draft
from jsfdd.weights.target import describe_target, read_architecture

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
CASES = 120  # a family, where no time is given
CLEAN = (ValueError, FileNotFoundError, RefusedByTemplate)


class Family(NamedTuple):
    """Attributes:
    make: writes the seed's files into a directory and returns the one that is damaged.
    read: what reads it: the directory -> what it holds, comparable.
    sealed: whether what is read must be what was written, or be refused. A JSON file without its checksum is one that a
        person wrote.
    named: whether an error names the file.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    sealed: bool = False
    named: bool = True
    cases: int = CASES


def _selection(folder):
    write_selection(folder / "selection.json", dataclasses.replace(select(make_table()), inputs={"scores": {"target": "t"}}))
    return folder / "selection.json"


def _scores(folder):
    write_scores(folder / "scores.parquet", make_table())
    return folder / "scores.parquet"


def _token_scores(folder):
    write_token_scores(folder / "token_scores.parquet", make_table())
    return folder / "token_scores.parquet"


def _store(folder):
    with HiddenWriter(folder, 4, "float32", {"t": 1}, 64) as writer:
        for i in range(3):
            writer.add(f"s{i}", np.full((3, 4), i + 1.0, np.float32))
    return folder / "manifest.json"


def _read_store(folder):
    store = HiddenStore.open(folder, None)
    return {name: store[name].tolist() for name in store}


def _shard(folder):
    _store(folder)
    return folder / "shard-00001.bin"


def _metrics(folder):
    with Journal(folder, 0) as journal:
        for step in (3, 6):
            journal.note({"step": step, "loss": 0.25 * step})
            journal.note_timing({"step": step, "seconds": 1.5})
        journal.seal(6)
    return folder / METRICS


def _timings(folder):
    _metrics(folder)
    return folder / "timings.jsonl"


def _answers(folder):
    open_log(folder / "a.parts", {"t": 1})
    append_batch(folder / "a.parts", AnsweredBatch(0, [1], [("yes", 2, False)], [3, 1]))
    return folder / "a.parts"


def _report(folder):
    values = {"config": {"target": "t"}, "tau": 2.0, "tau_low": 1.5, "tau_high": 2.5, "alpha": [0.5], "n_prompts": 3}
    (folder / "report.json").write_text(json.dumps(values))
    return folder / "report.json"


def _chats(name):
    def make(folder):
        return write_chats(folder / name, 4)

    return make


def _chats_json(folder):
    rows = [json.loads(line) for line in write_chats(folder / "x", 4).read_text().splitlines()]
    (folder / "x").unlink()
    (folder / "chats.json").write_text(json.dumps(rows))
    return folder / "chats.json"


def _chats_parquet(folder):
    rows = json.loads(_chats_json(folder).read_text())
    (folder / "chats.json").unlink()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "chats.parquet")
    return folder / "chats.parquet"


def _read_chats(folder):
    (path,) = folder.iterdir()
    return read_chat_files((path,)).chats and None


def _prompts(folder):
    return write_prompts(folder / "prompts.jsonl")


def _read_prompts(folder):
    (path,) = folder.iterdir()
    read_prompts((path,))


def _target(name):
    def make(folder):
        shutil.copytree(SEEDS / "target", folder, dirs_exist_ok=True)
        return folder / name

    return make


def _draft(name):
    def make(folder):
        shutil.copytree(SEEDS / "draft", folder, dirs_exist_ok=True)
        return folder / name

    return make


def _read_draft(folder):
    from jsfdd.weights.draft import load_draft

    load_draft(folder)


def _template(folder):
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder / "chat_template.jinja"


def _render(folder):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    check_tokenizer(tokenizer)
    render(tokenizer, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}])


SEEDS = Path()
FAMILIES = {
    "selection.json": Family(_selection, lambda f: read_selection(f / "selection.json"), sealed=True),
    "scores.parquet": Family(_scores, lambda f: repr(read_scores(f / "scores.parquet")), sealed=True),
    "token_scores.parquet": Family(_token_scores, lambda f: repr(read_token_scores(f / "token_scores.parquet")), sealed=True),
    "manifest.json": Family(_store, _read_store, sealed=True),
    "shard": Family(_shard, _read_store, sealed=True),
    "metrics.jsonl": Family(_metrics, lambda f: [line for line in read_metrics(f) if line["step"] <= 6], sealed=True),
    "timings.jsonl": Family(_timings, lambda f: sum(line["seconds"] for line in read_lines(f / "timings.jsonl"))),
    "answers.parts": Family(_answers, lambda f: read_log(f / "a.parts", {"t": 1})),
    "report.json": Family(_report, lambda f: read_report(f / "report.json")),
    "chats.jsonl": Family(_chats("chats.jsonl"), _read_chats),
    "chats.json": Family(_chats_json, _read_chats),
    "chats.parquet": Family(_chats_parquet, _read_chats),
    "prompts.jsonl": Family(_prompts, _read_prompts),
    "config.json": Family(_target("config.json"), lambda f: read_architecture(str(f))),
    "tokenizer.json": Family(_target("tokenizer.json"), lambda f: describe_target(str(f)), cases=30),
    "tokenizer_config.json": Family(_target("tokenizer_config.json"), lambda f: describe_target(str(f)), cases=30),
    "draft config.json": Family(_draft("config.json"), _read_draft, cases=60),
    "draft model.safetensors": Family(_draft("model.safetensors"), _read_draft, cases=60),
    "chat template": Family(_template, _render, named=False),
}


@pytest.fixture(scope="module", autouse=True)
def seeds(tmp_path_factory):
    global SEEDS
    SEEDS = tmp_path_factory.mktemp("seeds")
    write_target(SEEDS / "target")
    draft, params = toy_draft(toy_config())
    write_draft(SEEDS / "draft", draft, params, "vllm")


def check(family: Family, folder: Path, path: Path, data: bytes, expected, seed: int) -> None:
    changed = mutated(data, seed)
    path.write_bytes(changed)
    try:
        found = family.read(folder)
    except CLEAN as error:
        assert not family.named or str(folder) in str(error), f"seed {seed}: an error without the file: {error}"
    else:
        by_hand = path.suffix == ".json" and b"sha256_of_the_rest" not in changed
        assert not family.sealed or by_hand or found == expected, f"seed {seed}: other content was accepted"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_hostile_files_are_refused_by_name(name, tmp_path):
    family = FAMILIES[name]
    path = family.make(tmp_path)
    data, expected = path.read_bytes(), family.read(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = 0
    if SECONDS:
        end = time.monotonic() + SECONDS / len(FAMILIES)
        while time.monotonic() < end:
            check(family, tmp_path, path, data, expected, int.from_bytes(os.urandom(7), "big"))
            cases += 1
    else:

        @settings(
            max_examples=family.cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(st.integers(0, 2**56))
        def some(seed):
            nonlocal cases
            check(family, tmp_path, path, data, expected, seed)
            cases += 1

        some()
    with (Path(os.environ["FUZZ_LOG"]) if "FUZZ_LOG" in os.environ else tmp_path / "cases").open("a") as log:
        log.write(json.dumps({"family": name, "cases": cases}) + "\n")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "a small file took a gigabyte"
