"""The command line: what a wrong input looks like to a person, and what a right one prints."""

import json

import pytest
from toy import write_target

from jsfdd import config as options
from jsfdd.cli import _COMMANDS, main


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(write_target(tmp_path_factory.mktemp("target") / "toy"))


def _file(tmp_path, name, *rows):
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c d"}]}


@pytest.mark.parametrize(
    "rows, words",
    [
        ((GOOD, '{"messages": ['), [":2:", "JSON"]),
        ((GOOD, {"messages": [{"role": "user", "content": "a"}]}), [":2:", "assistant"]),
        ((GOOD, {"messages": [{"role": "robot", "content": "a"}]}), [":2:", "unknown role 'robot'", "use one of"]),
    ],
)
def test_bad_rows_are_one_line_and_exit_code_2(tmp_path, target, capsys, rows, words):
    data, out = _file(tmp_path, "chats.jsonl", *rows), tmp_path / "out"
    assert main(["score", "--target", target, "--data", data, "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("jsfdd: error: ") and "\n" not in error and data in error
    assert all(word in error for word in words)
    assert not out.exists()


def test_a_missing_target_says_how_to_get_one(tmp_path, capsys):
    data = _file(tmp_path, "chats.jsonl", GOOD)
    assert main(["score", "--target", str(tmp_path / "none"), "--data", data, "--out", str(tmp_path / "out")]) == 2
    assert "smollm2" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(tmp_path, target, capsys):
    """A file where the directory should be: root may write anywhere, so permissions cannot be tested."""
    data, blocked = _file(tmp_path, "chats.jsonl", GOOD), tmp_path / "file"
    blocked.write_text("")
    for command in (["score"], ["train"]):
        assert main([*command, "--target", target, "--data", data, "--out", str(blocked)]) == 2
        assert str(blocked) in capsys.readouterr().err


def test_a_draft_that_is_not_there(tmp_path, capsys):
    assert main(["export", "--draft", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["select", "--scores", "s", "--out", "o", "--retain-ratio", "1.5"], "--retain-ratio"),
        (["generate", "--target", "smollm2", "--prompt", "x"], "--no-draft"),
        (["run", "--target", "t", "--data", "d", "--prompts", "p", "--out", "o", "--arms", "full", "flattest"], "flattest"),
        (["score", "--targett", "x"], "--target"),
    ],
)
def test_wrong_options_exit_with_2(arguments, word, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert word in captured.err + captured.out


def test_generate_streams_the_greedy_text(target, capsys):
    arguments = ["generate", "--target", target, "--prompt", "hello", "--no-draft", "--max-new-tokens", "12"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out != "\n"
    assert "tokens/s" in first.err and "τ" not in first.err
    assert main([*arguments[:4], " ", *arguments[5:]]) == 2
    assert "--prompt is empty" in capsys.readouterr().err


def test_one_name_one_meaning():
    """Design §5: an option has the same type and default in every command (`out` differs in what it is a directory of)."""
    seen = {}
    for kind in _COMMANDS.values():
        for name, field in kind.__dataclass_fields__.items():
            if name in ("out", "draft", "seed"):
                continue
            assert seen.setdefault(name, (field.type, field.default)) == (field.type, field.default), (kind, name)
    assert {"target", "retain_ratio", "num_draft_tokens"} <= set(seen)


@pytest.mark.parametrize("kind", [options.RunConfig, options.TrainConfig, options.EvaluateConfig])
def test_every_option_is_explained(kind, capsys):
    command = next(name for name, value in _COMMANDS.items() if value is kind)
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for name in kind.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
