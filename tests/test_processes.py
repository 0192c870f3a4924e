"""Two real processes on this machine as one run: the same results as one, clear ends, and a restart that completes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_pipeline import _chats, _prompts
from toy import write_target

from jsfdd.selection.table import METRICS, read_scores
from jsfdd.weights.checkpoint import load_draft

HERE = Path(__file__).parent
LIMIT = 100  # seconds within which anything here ends, on a slow machine


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def begin(arguments, process, port, count=2, devices=2):
    """One process of `count`, with forced CPU devices of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    places = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), "--process-id", str(process)]
    command = [sys.executable, "-m", "jsfdd.cli", *map(str, arguments), *(places if count > 1 else [])]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes):
    """[(exit code, stdout, stderr)] of each."""
    ends = []
    for process in processes:
        try:
            out, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"still running after {LIMIT} s: {process.communicate()[1][-2000:]}")
        ends.append((process.returncode, out, errors))
    return ends


def run(arguments, count=2, devices=2, other=None):
    """Run a command in `count` processes; the last gets the arguments `other`, if given."""
    port = free_port()
    all_arguments = [arguments] * (count - 1) + [other or arguments]
    return finish([begin(each, i, port, count, devices) for i, each in enumerate(all_arguments)])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    _chats(folder / "chats.jsonl"), _prompts(folder / "prompts.jsonl"), write_target(folder / "target")
    return folder


def score_arguments(inputs, out):
    return [
        "score", "--target", inputs / "target", "--data", inputs / "chats.jsonl", "--max-length", 128,
        "--batch-tokens", 256, "--out", out,
    ]  # fmt: skip


def train_arguments(inputs, out, *more):
    return [
        "train", "--target", inputs / "target", "--data", inputs / "chats.jsonl", "--max-length", 128, "--epochs", 1,
        "--batch-tokens", 512, "--held-out-share", 0.1, "--out", out, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """What this one process makes of score, select and train."""
    out = tmp_path_factory.mktemp("alone")
    shared = dict(target=str(inputs / "target"), data=(inputs / "chats.jsonl",), max_length=128)
    pipeline.score(ScoreConfig(**shared, batch_tokens=256, out=out))
    pipeline.select(SelectConfig(scores=out / "scores.parquet", retain_ratio=0.5, out=out))
    pipeline.train(
        TrainConfig(
            **shared, batch_tokens=512, epochs=1, held_out_share=0.1, selection=out / "selection.json", out=out / "draft"
        )
    )
    return out


def assert_same_scores(found, expected):
    a, b = read_scores(found / "scores.parquet"), read_scores(expected / "scores.parquet")
    assert a.ids == b.ids and len(a.ids) == 24
    for name in ("num_tokens", *METRICS):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def assert_same_draft(found, expected):
    import jax

    for a, b in zip(*(jax.tree.leaves(load_draft(path)[1]) for path in (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_every_stage_in_two_processes(inputs, alone, tmp_path):
    """Scores to the bit, the same selection, the same draft but for rounding, and a report."""
    select = ["select", "--scores", tmp_path / "scores.parquet", "--retain-ratio", 0.5, "--out", tmp_path]
    evaluate = [
        "evaluate", "--target", inputs / "target", "--draft", tmp_path / "draft", "--prompts", inputs / "prompts.jsonl",
        "--max-new-tokens", 8, "--num-draft-tokens", 2, "--batch-size", 4, "--out", tmp_path / "evaluated",
    ]  # fmt: skip
    train = train_arguments(inputs, tmp_path / "draft", "--selection", tmp_path / "selection.json")
    for arguments in (score_arguments(inputs, tmp_path), select, train, evaluate):
        first, second = run(arguments)
        assert (first[0], second[0]) == (0, 0), first[2][-2000:] + second[2][-2000:]
        assert str(tmp_path) in first[1] and str(tmp_path) not in second[1]  # the first process alone reports
    assert_same_scores(tmp_path, alone)
    assert (tmp_path / "selection.json").read_text() == (alone / "selection.json").read_text()
    assert_same_draft(tmp_path / "draft", alone / "draft")
    stored = json.loads((tmp_path / "draft" / "hidden" / "manifest.json").read_text())["shards"]
    names = [name for shard in stored for name, _ in shard["samples"]]
    assert len(stored) == 2 and len(names) == len(set(names)) >= 12  # a shard of each process, no sample twice
    assert not list((tmp_path / "draft" / "hidden").glob("manifest-*"))
    report = json.loads((tmp_path / "evaluated" / "report.json").read_text())
    assert report["tau"] >= 1 and report["same_text_share"] == 1.0 and report["hardware"]["num_processes"] == 2


def kill_when(process, ready, limit=LIMIT):
    """SIGKILL as soon as `ready()`."""
    until = time.monotonic() + limit
    while not ready():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1][-2000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_a_restart_completes(inputs, alone, tmp_path, killed):
    arguments = train_arguments(
        inputs, tmp_path / "draft", "--selection", alone / "selection.json", "--save-every", 1, "--epochs", 2000
    )
    port = free_port()
    processes = [begin(arguments, i, port) for i in range(2)]
    kill_when(processes[killed], lambda: (tmp_path / "draft" / "checkpoints" / "1").exists())
    begun = time.monotonic()
    code, _, errors = finish(processes)[1 - killed]
    assert code not in (0, 1) and time.monotonic() - begun < LIMIT
    assert "start all of them again" in errors or "distributed service" in errors
