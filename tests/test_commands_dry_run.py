"""--dry-run: the numbers of the stage itself, no model and no file; the stage's own errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from toy import toy_config, toy_draft, write_target

from jsfdd.commands.cli import main
from jsfdd.scoring.metrics import column_names
from jsfdd.scoring.table import ScoreTable, write_scores
from jsfdd.weights import huggingface
from jsfdd.weights.export import write_draft

pytestmark = pytest.mark.slow

CHAT = {"role": "assistant", "content": "the cat sat on a mat"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory with a target, chats, prompts, scores and a draft."""
    folder = tmp_path_factory.mktemp("inputs")
    write_target(folder / "target")
    (folder / "chats").mkdir()
    for name, questions in (("a", "abcdefgh"), ("b", "hijk")):
        rows = [{"messages": [{"role": "user", "content": question}, CHAT]} for question in questions]
        (folder / "chats" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"turns": ["one", "two"]}, {"turns": ["one"]}, {"turns": ["one"]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    columns = {name: np.arange(1.0, 5.0) for name in column_names()}
    ids = tuple(f"a-{number}" for number in range(1, 5))
    table = ScoreTable(ids, ids, np.ones(4, np.int32), columns, identity={})
    write_scores(folder / "scores.parquet", table)
    draft, params = toy_draft(toy_config(vocab_size=258, max_position=1024))
    write_draft(folder / "draft", draft, params, "eagle")
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    """A copy of the inputs as the working directory, where no weights of the target may be read."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface, "read_params", lambda *_: pytest.fail("read the target's weights"))
    return tmp_path


DATA = ["--target", "target", "--data", "chats", "--max-length", "128"]


def _dry(capsys, *arguments):
    """(result of --json, the words) of a dry run, which must leave the directory as it was."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert main([*arguments, "--dry-run", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--dry-run"]) == 0
    words = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert values["command"] == arguments[0] and values["dry_run"] is True
    assert words.startswith(f"dry run of {arguments[0]}: nothing was computed or written\n")
    return values, words


def test_score(place, capsys):
    values, words = _dry(capsys, "score", *DATA, "--batch-tokens", "512", "--out", "out", "--per-token")
    # 12 rows, "h" twice; ChatML of one byte a token: 9 + 2 around each of two messages, their contents, no prefix.
    assert (values["samples"], values["skipped"]) == (11, 1)
    length = len("<|im_start|>".join(["", "user\na", "assistant\n" + CHAT["content"]]).replace("<|im_start|>", "x")) + 2 * 2
    assert values["tokens"] == 11 * length and values["counted_tokens"] == 11 * len(CHAT["content"])
    assert [(count["file"], count["kept"], count["duplicates"]) for count in values["files"]] == [
        ("chats/a.jsonl", 8, 0), ("chats/b.jsonl", 3, 1)
    ]  # fmt: skip
    assert values["would_write"] == ["out/scores.parquet", "out/token_scores.parquet", "out/scores.parts/"]
    assert "score 11 samples (1 row skipped)" in words and "write to out: scores.parquet" in words


def test_what_was_begun_would_be_continued(place, capsys):
    (place / "out" / "scores.parts").mkdir(parents=True)
    values, words = _dry(capsys, "score", *DATA, "--out", "out")
    assert values["continues"] and "continue in out" in words


def test_select(place, capsys):
    values, words = _dry(capsys, "select", "--scores", "scores.parquet", "--retain-ratio", "0.5", "--out", "out")
    assert f"keep 2 of {values['ranked']} samples" in words and values["ranked"] > 2
    assert (values["kept"], values["thresholds"], values["would_write"]) == (2, {"all": 3.0}, ["out/selection.json"])


def test_train(place, capsys):
    shared = ["--held-out-share", "0.2", "--batch-tokens", "512", "--epochs", "3", "--out", "out"]
    values, words = _dry(capsys, "train", *DATA, *shared)
    assert values["samples"] + values["held_out"] == 11 and values["held_out"] > 0
    # Samples of under 64 tokens, 512 a batch, on four devices: 8 rows.
    assert values["steps"] == 3 * -(-values["samples"] // 8) and f"{values['steps']} steps in 3 epochs" in words
    assert not values["estimated"]


def test_train_on_a_mixture(place, capsys):
    """Sources are the files' names; what is held out is the same as without."""
    shared = ["--held-out-share", "0.2", "--batch-tokens", "512", "--epochs", "3", "--out", "out"]
    plain, _ = _dry(capsys, "train", *DATA, *shared)
    values, words = _dry(capsys, "train", *DATA, *shared, "--mix", "a=2", "b=1", "--mix-total", "3")
    tokens = len(CHAT["content"])
    assert values["mix"] == {"a": {"samples": 2, "counted_tokens": 2 * tokens}, "b": {"samples": 1, "counted_tokens": tokens}}
    assert (values["samples"], values["steps"], values["held_out"]) == (3, 3, plain["held_out"]) and "mix" not in plain
    assert f"a mixture of samples: 2 of a ({2 * tokens} counted tokens), 1 of b ({tokens} counted tokens)" in words
    for mix, message in (
        (["--mix", "maths=1"], "no sample to train on is of source 'maths'; choose from a ("),
        (["--mix", "a=1", "b=1", "--mix-total", "9"], "b is to be 0.5 of it"),
    ):
        assert main(["train", *DATA, *shared, *mix, "--dry-run"]) == 2
        assert message in capsys.readouterr().err


def test_train_on_likeliest_tokens(place, capsys):
    shared = [
        *DATA,
        "--held-out-share",
        "0.2",
        "--batch-tokens",
        "512",
        "--out",
        "out",
        "--soft-targets",
        "top_k",
    ]
    values, words = _dry(capsys, "train", *shared)
    assert values["soft_target_bytes"] == values["tokens"] * (4 * 32 + 2)
    assert "of the target's 32 likeliest tokens" in words and "out/soft_targets/" in values["would_write"]


def test_evaluate(place, capsys):
    arguments = ["--target", "target", "--draft", "draft", "--prompts", "prompts.jsonl", "--batch-size", "4", "--out", "out"]
    values, words = _dry(capsys, "evaluate", *arguments)
    assert (values["prompts"], values["turns"], values["batches"]) == (3, 4, 2)
    assert "decode 3 prompts (4 turns) in 2 batches" in words and values["drafts"] == ["draft"]
    assert main(["evaluate", *arguments, "--max-new-tokens", "2000", "--dry-run"]) == 2
    assert "exceed the context of 1024 tokens" in capsys.readouterr().err


def test_export(place, capsys):
    values, _ = _dry(capsys, "export", "--draft", "draft", "--out", "out")
    assert (values["hidden_size"], values["would_write"]) == (32, ["out/config.json", "out/model.safetensors", "out/README.md"])
    assert main(["export", "--draft", "draft", "--out", "draft", "--dry-run"]) == 2
    assert "already there; choose another --out" in capsys.readouterr().err


def test_run(place, capsys):
    values, words = _dry(capsys, "run", *DATA, "--prompts", "prompts.jsonl", "--out", "out")
    assert list(values["arms"]) == ["full", "flatness", "random"]
    full, half = values["arms"]["full"], values["arms"]["flatness"]
    assert not full["estimated"] and half["estimated"] and half["samples"] == (full["samples"] + 1) // 2
    assert "flatness: train on about" in words and "for 3 drafts" in words
    assert "out/summary.json" in values["would_write"] and "out/arms/random/" in values["would_write"]


def test_a_run_mixes_what_each_arm_selects(place, capsys):
    shared = ["--prompts", "prompts.jsonl", "--held-out-share", "0", "--out", "out", "--mix", "a=1", "b=1"]
    values, words = _dry(capsys, "run", *DATA, *shared)
    full, half = values["arms"]["full"], values["arms"]["flatness"]
    assert full["mix"]["a"] == full["mix"]["b"] and full["samples"] == 6 and half["samples"] == 3
    values, words = _dry(capsys, "run", *DATA, *shared, "--mix-total", "4")
    assert [arm["samples"] for arm in values["arms"].values()] == [4, 4, 4]
    assert [arm["estimated"] for arm in values["arms"].values()] == [False, True, True]


def test_wrong_input_is_the_stages_own_error(place, capsys):
    (place / "chats" / "c.jsonl").write_text('{"messages": []}\n')
    assert main(["score", *DATA, "--out", "out", "--dry-run", "--strict"]) == 2
    assert "chats/c.jsonl:1: the conversation is empty" in capsys.readouterr().err
    (place / "chats" / "c.jsonl").unlink()
    assert main(["train", *DATA, "--out", "prompts.jsonl", "--dry-run"]) == 2
    assert "prompts.jsonl: not a directory; choose another --out" in capsys.readouterr().err
    assert main(["train", *DATA, "--out", "out", "--token-retain-ratio", "0.5", "--token-scores", "none", "--dry-run"]) == 2
    assert "none: no such file" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_a_warning_beforehand(place, capsys, monkeypatch):
    training = ["train", *DATA, "--held-out-share", "0.2", "--out", "out"]
    values, words = _dry(capsys, *training)
    stored = values["hidden_bytes"] + values["soft_target_bytes"] + values["checkpoint_bytes"]
    assert values["wanted_bytes"] == stored > 0 and "warning" not in words
    run = ["run", *DATA, "--prompts", "prompts.jsonl", "--out", "out"]
    assert _dry(capsys, *run)[0]["wanted_bytes"] > 3 * values["checkpoint_bytes"]
    monkeypatch.setattr("jsfdd.commands.outcome.free_bytes", lambda _: stored - 1)
    assert "MB are wanted in out, and the disk has" in _dry(capsys, *training)[1]
    monkeypatch.setattr("jsfdd.commands.plan.free_bytes", lambda _: 1)
    assert main(["plan", *DATA]) == 0
    assert "the disk has 0.0 MB free; make room" in capsys.readouterr().out
