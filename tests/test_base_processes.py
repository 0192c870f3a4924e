"""Two real processes on this machine as one run: the same results as one, clear ends, and a restart that completes."""

import json
import threading
import time

import jax
import numpy as np
import pytest
from as_one_process import every_stage, every_stage_late
from children import LIMIT, Child, begin_command, finish, free_port
from toy import write_chats, write_prompts, write_target

from jsfdd.base import processes
from jsfdd.base.processes import start
from jsfdd.commands.cli import main
from jsfdd.scoring.table import read_scores
from jsfdd.weights.draft import load_draft

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_chats(folder / "chats.jsonl"), write_prompts(folder / "prompts.jsonl"), write_target(folder / "target")
    return folder


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """What one process with four devices makes of all stages."""
    out = tmp_path_factory.mktemp("alone")
    every_stage(inputs, out)
    return out


def assert_same_draft(found, expected):
    for a, b in zip(*(jax.tree.leaves(load_draft(path).params) for path in (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_every_stage_in_two_processes(inputs, alone, tmp_path):
    """Scores to the bit, the same selection, the same draft but for rounding, the same answers; and that though the file
    system shows the one what the other wrote a second late."""
    coordinator = f"127.0.0.1:{free_port()}"
    ends = finish([Child(every_stage_late, inputs, tmp_path, coordinator, 2, i, devices=2) for i in range(2)])
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2][-2000:] + ends[1][2][-2000:]

    found, expected = read_scores(tmp_path / "scores.parquet"), read_scores(alone / "scores.parquet")
    assert found.ids == expected.ids and len(found.ids) == 24
    np.testing.assert_array_equal(found.num_tokens, expected.num_tokens)
    for name in expected.metrics:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    parts = {int(path.stem[-5:]) % 2 for path in (tmp_path / "scores.parts").glob("part-*.parquet")}
    assert parts == {0, 1}  # each process wrote its own
    selections = [json.loads((path / "selection.json").read_text()) for path in (tmp_path, alone)]
    assert selections[0]["ids"] == selections[1]["ids"]

    assert_same_draft(tmp_path / "draft", alone / "draft")
    shards = json.loads((tmp_path / "draft" / "hidden" / "manifest.json").read_text())["shards"]
    names = [name for shard in shards for name, _ in shard["samples"]]
    assert len(shards) == 2 and len(names) == len(set(names)) >= 12  # a shard of each process, no sample twice or lost
    assert not list((tmp_path / "draft" / "hidden").glob("manifest-*"))

    reports = [json.loads((path / "evaluated" / "report.json").read_text()) for path in (tmp_path, alone)]
    assert reports[0]["prompts"] == reports[1]["prompts"] and reports[0]["same_text_share"] == 1.0
    assert reports[0]["hardware"]["num_processes"] == 2


def train_arguments(inputs, alone, out):
    return [
        "train", "--target", inputs / "target", "--data", inputs / "chats.jsonl", "--max-length", 128, "--epochs", 2,
        "--batch-tokens", 512, "--held-out-share", 0.1, "--selection", alone / "selection.json", "--save-every", 1,
        "--shard-optimizer", "--out", out,
    ]  # fmt: skip


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_a_restart_completes(inputs, alone, tmp_path, killed):
    """Killed once hidden states are being stored or steps taken; the restart is one process, and ends the same."""
    both = begin_command(*train_arguments(inputs, alone, tmp_path / "draft"))
    until = time.monotonic() + LIMIT
    while not (tmp_path / "draft" / "hidden" / "manifest.json").exists():
        assert both[killed].running and time.monotonic() < until, both[killed].finish()[2][-2000:]
        time.sleep(0.01)
    both[killed].kill()
    start = time.monotonic()
    code, _, errors = finish(both)[1 - killed]
    assert code != 0 and time.monotonic() - start < 2 * processes._HEARTBEAT
    # Of the second process the first's end is told by JAX itself, which then ends it.
    words = ("all of them again with the same command", "JAX distributed service detected fatal errors")
    assert any(text in errors for text in words), errors[-2000:]
    assert main([str(word) for word in train_arguments(inputs, alone, tmp_path / "draft")]) == 0
    assert_same_draft(tmp_path / "draft", alone / "draft")


def test_when_one_finds_the_disk_full_both_end_and_a_restart_completes(inputs, alone, tmp_path):
    parts = tmp_path / "scores.parts"
    parts.mkdir()
    (parts / "part-00001.parquet.tmp").symlink_to("/dev/full")
    arguments = [
        "score",
        "--target",
        inputs / "target",
        "--data",
        inputs / "chats.jsonl",
        "--max-length",
        128,
        "--batch-tokens",
        256,
    ]
    ends = finish(begin_command(*arguments, "--out", tmp_path))
    assert ends[1][0] == 2 and "part-00001.parquet: no space left on device" in ends[1][2], ends[1][2][-2000:]
    assert ends[0][0] == 3 and "all of them again with the same command" in ends[0][2], ends[0][2][-2000:]
    assert main([str(word) for word in [*arguments, "--out", tmp_path]]) == 0
    found, expected = read_scores(tmp_path / "scores.parquet"), read_scores(alone / "scores.parquet")
    assert found.ids == expected.ids
    np.testing.assert_array_equal(found["flatness"], expected["flatness"])


def test_a_file_of_another_process_is_waited_for_until_it_is_whole_and_named_if_it_does_not_come(tmp_path, monkeypatch):
    path = tmp_path / "part-00001.parquet"
    path.write_bytes(b"whole")
    written = {str(path): processes._mark(path)}

    def wait():
        gathered = iter([lambda own: [own, written], lambda missing: [missing, None]])
        monkeypatch.setattr(processes, "_gather_json", lambda value: next(gathered)(value))
        processes.wait_until_seen([])

    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "_UNSEEN", 0.2)
    wait()
    for part in (b"who", b"older"):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="part-00001.parquet: process 0 does not see this file.*the same command"):
            wait()
    path.unlink()
    monkeypatch.setattr(processes, "_UNSEEN", 60.0)
    threading.Timer(0.3, path.write_bytes, [b"whole"]).start()
    wait()
    assert path.read_bytes() == b"whole"


def test_processes_with_other_data_or_options_all_end_with_the_reason(inputs, tmp_path):
    def arguments(data, *more):
        return ["score", "--target", inputs / "target", "--data", data, "--max-length", 128, "--out", tmp_path / "out", *more]

    (tmp_path / "other.jsonl").write_text("".join((inputs / "chats.jsonl").read_text().splitlines(True)[:-1]))
    ends = finish(begin_command(*arguments(inputs / "chats.jsonl"), second=arguments(tmp_path / "other.jsonl")))
    for code, _, errors in ends:
        assert code == 2 and "process 1 and process 0 differ in" in errors, errors[-2000:]
        assert "the same options and the same files" in errors
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("auto", 2, 0), "go with --coordinator HOST:PORT"),
        ((None, 2, None), "go with --coordinator HOST:PORT"),
        (("10.0.0.1:80", 2, None), "give --num-processes and --process-id"),
        (("10.0.0.1", 2, 0), "must be HOST:PORT"),
        (("10.0.0.1:80", 2, 2), "must be from 0 to 1"),
    ],
)
def test_options_that_do_not_fit_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        start(*arguments)
    assert not jax.distributed.is_initialized()
