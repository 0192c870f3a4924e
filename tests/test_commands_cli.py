"""The command line: what a wrong input looks like to a person, and what a right one prints."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from toy import random_draft, toy_draft, write_target

from jsfdd.base.files import read_json
from jsfdd.commands import cli
from jsfdd.commands.cli import COMMANDS, command, main
from jsfdd.commands.options import OutputOptions, options_of
from jsfdd.models.architecture import Rope
from jsfdd.models.draft import draft_config
from jsfdd.scoring.metrics import column_names
from jsfdd.scoring.table import ScoreTable, write_scores
from jsfdd.training.recipe import PYTHON_ONLY
from jsfdd.weights.export import write_draft
from jsfdd.weights.target import load_target


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
    assert main(["score", "--target", target, "--data", data, "--out", str(out), "--strict"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("jsfdd: error: ") and "\n" not in error and data in error
    assert all(word in error for word in words)
    assert not out.exists()


def test_a_bad_row_is_skipped_and_told_with_its_place(tmp_path, target, capsys):
    data = _file(
        tmp_path, "chats.jsonl", GOOD, {"messages": [{"role": "robot", "content": "a"}], "lang": "en"}, GOOD | {"x": 1}
    )
    command = ["score", "--target", target, "--data", data, "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert f"{data}: 3 read, 1 kept; skipped: 1 duplicates, 1 with an unknown speaker" in told
    assert f"first: {data}:2: message 1: unknown role 'robot'" in told and "not read: 1 rows have 'x'" in told
    assert main([*command, "--max-skipped", "10%"]) == 2
    told = capsys.readouterr().err
    assert "1 of 3 rows cannot be learned from, more than --max-skipped 10%" in told and f"first {data}:2" in told
    assert main([*command, "--max-skipped", "0.4"]) == 0
    capsys.readouterr()
    assert _exit_code([*command, "--max-skipped", "half"]) == 2
    assert "a share as 5% or 0.05" in " ".join(capsys.readouterr().err.split())


def test_a_conversation_beyond_the_context_is_cut_there_and_a_token_beyond_the_embedding_is_refused(tmp_path, target, capsys):
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 300}]}
    command = ["score", "--target", target, "--out", str(tmp_path / "out"), "--dry-run", "--data"]
    assert main([*command, _file(tmp_path, "long.jsonl", long)]) == 0
    told = capsys.readouterr()
    assert (
        "1 conversations are cut after 1024 tokens, where the target's context ends" in told.err and "1,024 tokens" in told.out
    )
    tokens = {"input_ids": [1, 2, 300], "loss_mask": [0, 1, 1]}
    assert main([*command, _file(tmp_path, "beyond.jsonl", tokens)]) == 2
    assert "token id 300, which the model of 258 rows does not embed" in capsys.readouterr().err


def test_a_day_and_variables_are_the_template_s(tmp_path, target, capsys):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ strftime_now('%Y') }} {{ name }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
    )
    data = _file(tmp_path, "chats.jsonl", GOOD)
    command = ["score", "--target", target, "--data", data, "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    counts = []
    for more in (
        [],
        ["--chat-template", str(template)],
        ["--chat-template", str(template), "--template-kwargs", '{"name": "xyz"}'],
    ):
        assert main([*command, *more]) == 0
        counts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert counts[1] - counts[0] == len("2024 ") and counts[2] - counts[1] == len("xyz")
    for bad, words in (
        (["--date", "May"], "YYYY-MM-DD"),
        (["--template-kwargs", "[1]"], "a JSON object"),
        (["--template-kwargs", "{"], "not JSON"),
    ):
        assert _exit_code([*command, *bad]) == 2 and words in " ".join(capsys.readouterr().err.split())


def test_a_missing_target_says_how_to_get_one(tmp_path, capsys):
    data = _file(tmp_path, "chats.jsonl", GOOD)
    assert main(["score", "--target", str(tmp_path / "none"), "--data", data, "--out", str(tmp_path / "out")]) == 2
    assert "smollm2" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(tmp_path, target, capsys):
    """A file where the directory should be: root may write anywhere, so permissions cannot be tested."""
    data, blocked = _file(tmp_path, "chats.jsonl", GOOD), tmp_path / "file"
    blocked.write_text("")
    for name in ("score", "train"):
        assert main([name, "--target", target, "--data", data, "--out", str(blocked)]) == 2
        assert str(blocked) in capsys.readouterr().err
    for arguments in (
        ["evaluate", "--draft", "none", "--prompts", data, "--out", str(blocked)],
        ["respond", "--data", data, "--out", str(blocked / "a" / "b.jsonl")],
    ):
        assert main([*arguments, "--target", target, "--dry-run"]) == 2
        assert f"{blocked}: not a directory; choose another --out" in capsys.readouterr().err


def test_a_draft_that_is_not_there(tmp_path, capsys):
    assert main(["export", "--draft", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


_GENERATE = ["generate", "--target", "t", "--prompt", "x"]
_EVALUATE = ["evaluate", "--target", "t", "--prompts", "p", "--out", "o"]
_SCORE = ["score", "--target", "t", "--data", "d", "--out", "o"]


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["select", "--scores", "s", "--out", "o", "--retain-ratio", "1.5"], "--retain-ratio"),
        (["run", "--target", "t", "--data", "d", "--prompts", "p", "--out", "o", "--arms", "full", "flattest"], "flattest"),
        (["score", "--targett", "x"], "--target"),
        ([*_SCORE, "--keep-hidden", "flatness", "--retain-ratio", "0"], "--retain-ratio: got"),
        (["run", "--target", "t", "--data", "d", "--prompts", "p", "--out", "o", "--hidden-from", "d"], "--hidden-from"),
        ([*_SCORE, "--keep-hidden", "flattest", "--retain-ratio", "0.5"], "'flattest' is unknown; choose from full, flatness"),
        ([*_SCORE, "--keep-hidden", "full", "full"], "--keep-hidden: got"),
        ([*_SCORE, "--retain-ratio", "0.3"], "--retain-ratio goes with --keep-hidden"),
        ([*_SCORE, "--hidden-dtype", "int8"], "--hidden-dtype goes with --keep-hidden"),
        ([*_SCORE, "--max-length", "1"], "jsfdd: error: --max-length: got 1, but it must be 8 tokens or more"),
        ([*_SCORE, "--max-length", "abc"], "Error parsing --max-length"),
        (["score", "--target", "", "--data", "d", "--out", "o"], "--target: got ''"),
        (["score", "--target", "t", "--data", "d", "", "--out", "o"], "--data: got an empty path"),
        (["score", "--target", "t", "--data", "d", "--out="], "--out: got an empty path"),
        ([*_SCORE, "--num-processes", "2", "--dry-run"], "go with --coordinator"),
        (["train", *_SCORE[1:], "--no-hidden-store", "--hidden-dtype", "int8"], "take bfloat16 or float32"),
        (["train", *_SCORE[1:], "--no-hidden-store", "--hidden-from", "d"], "choose one"),
        (["train", *_SCORE[1:], "--mix", "a=0.5", "b"], "--mix: got ('a=0.5', 'b'), but it must be different SOURCE=WEIGHT"),
        (["train", *_SCORE[1:], "--mix", "a=1", "b=0"], "weights above 0, as in math=0.5 chat=0.5"),
        (["train", *_SCORE[1:], "--mix", "a=1", "a=2"], "different SOURCE=WEIGHT"),
        (["train", *_SCORE[1:], "--mix-total", "9"], "give its sources with --mix SOURCE=WEIGHT"),
        (["train", *_SCORE[1:], "--mix", "a=1", "--mix-total", "0"], "--mix-total: got 0"),
        (["train", *_SCORE[1:], "--token-loss", "hybrid", "--soft-targets", "means"], "take top_k"),
        (["train", *_SCORE[1:], "--draft-vocab", "4", "--no-hidden-store"], "--draft-vocab trains on soft targets"),
        (["train", *_SCORE[1:], "--hass-top-k-weight", "1"], "--hass-top-k-weight"),
        (["train", *_SCORE[1:], "--learning-rate", "inf"], "--learning-rate: got inf"),
        (["train", *_SCORE[1:], "--token-scores", "t"], "say how many with --token-retain-ratio"),
        (["generate", "--target", "t", "--prompt", " "], "--prompt is empty"),
        (["generate", "--target", "t", "--prompt", "x", "--show-accepted"], "--show-accepted"),
        (["generate", "--target", "t", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "--target", "t", "--prompt", "x", "--top-p", "0"], "--top-p"),
        (["respond", "--target", "t", "--data", "d", "--out", "o.jsonl", "--tree-nodes", "9"], "--tree-nodes"),
        (["respond", "--target", "t", "--data", "d", "--out", "answers"], "ends in .jsonl"),
        ([*_GENERATE, "--draft", "a", "b"], "got 2, but without --combine one draft decodes"),
        ([*_GENERATE, "--combine", "route", "--tree-nodes", "9"], "needs two drafts or more, but --draft gives 0"),
        ([*_EVALUATE, "--draft"], "at least one draft"),
        (
            [*_EVALUATE, "--draft", "a", "--combine", "merge", "--tree-nodes", "9"],
            "needs two drafts or more, but --draft gives 1",
        ),
        ([*_EVALUATE, "--draft", "a", "b", "--combine", "merge"], "--combine merge works on trees"),
        (
            [*_EVALUATE, "--draft", "a", "--combine", "merge", "--draft=b"],
            "--draft: given 2 times; give all its values after one",
        ),
        ([*_SCORE, "--keep-hidden", "full", "--keep_hidden", "full"], "--keep-hidden: given 2 times"),
        ([*_EVALUATE, "--draft", "a", "b", "--combine", "route"], "give --tree-nodes, with --tree-top-k 1"),
        (["scroe"], "no command 'scroe'; did you mean score?"),
        (["--target", "t"], "no command '--target'; take respond, score"),
    ],
)
def test_wrong_options_exit_with_2(arguments, word, capsys):
    assert _exit_code(arguments) == 2
    captured = capsys.readouterr()
    assert word in " ".join(captured.err.replace("│", "").split()) and not captured.out  # in a box, where it is tyro's


def _exit_code(arguments):
    """Of the process: `main` returns it, the parser raises it."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code or 0


@pytest.mark.slow
def test_generate_streams_the_greedy_text(target, capsys):
    arguments = ["generate", "--target", target, "--prompt", "hello", "--max-new-tokens", "40"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out != "\n"
    assert "tokens/s" in first.err and "τ" not in first.err


def test_a_tree_larger_than_its_depth_allows_is_refused_before_anything_is_read(tmp_path, capsys):
    """Neither target nor draft nor prompts exist: the tree is looked at first."""
    common = ["--target", "nowhere", "--draft", "nowhere", "--num-draft-tokens", "2", "--tree-nodes", "200"]
    for arguments in (["generate", "--prompt", "x"], ["evaluate", "--prompts", "nowhere", "--out", str(tmp_path / "out")]):
        assert main([*arguments, *common]) == 2
        assert "depth 2 with top-k 10 proposes 110 tokens; take fewer nodes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _export_draft(target, directory, seed=1, **changes):
    config = load_target(target).config
    draft, params = toy_draft(dataclasses.replace(config, **changes), seed)
    write_draft(directory, draft, params, "vllm")
    return str(directory)


@pytest.mark.parametrize("stated, message", [(True, "4 is out of range; the target has"), (False, "fewer than 7")])
def test_an_eagle3_draft_of_a_deeper_target_is_refused(tmp_path, target, capsys, stated, message):
    """Whether its files name the layers that it reads, or leave them to the engine."""
    config = dataclasses.replace(load_target(target).config, num_layers=9)
    draft = draft_config(config, kind="eagle3", target_layers=(0, 1, 4))
    write_draft(tmp_path / "draft", draft, random_draft(draft), "vllm")
    path = tmp_path / "draft" / "config.json"
    settings = json.loads(path.read_text())
    unstated = ("eagle_aux_hidden_state_layer_ids", "eagle_config")
    path.write_text(json.dumps({key: value for key, value in settings.items() if stated or key not in unstated}))
    assert main(["generate", "--target", target, "--prompt", "x", "--draft", str(tmp_path / "draft"), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_generate_marks_what_the_draft_proposed(tmp_path, target, capsys):
    draft = _export_draft(target, tmp_path / "draft")
    common = ["generate", "--target", target, "--prompt", "hello", "--max-new-tokens", "40"]
    assert main(common) == 0
    plain = capsys.readouterr().out
    # As wide as the whole vocabulary of bytes, so that an untrained draft is right now and then.
    tree = ["--draft", draft, "--num-draft-tokens", "2", "--tree-nodes", "150", "--tree-top-k", "100"]
    assert main([*common, *tree]) == 0
    unmarked = capsys.readouterr()
    assert unmarked.out == plain and "τ" in unmarked.err
    assert "a speculative step costs" in unmarked.err and "(computed)" in unmarked.err
    assert main([*common, *tree, "--show-accepted"]) == 0
    marked = capsys.readouterr().out
    assert re.sub(r"\[(.*?)\]", r"\1", marked, flags=re.DOTALL) == plain and marked != plain


@pytest.mark.slow
def test_generate_marks_which_draft_proposed(tmp_path, target, capsys):
    """By its number; the text without marks is that of each draft alone, and who had how many accepted is told at the end."""
    drafts = [_export_draft(target, tmp_path / "first"), _export_draft(target, tmp_path / "second", seed=2)]
    common = ["generate", "--target", target, "--prompt", "hello", "--max-new-tokens", "40", "--num-draft-tokens", "2"]
    tree = ["--tree-nodes", "150", "--tree-top-k", "100"]
    assert main([*common, *tree, "--draft", drafts[0]]) == 0
    plain = capsys.readouterr().out
    assert main([*common, *tree, "--draft", *drafts, "--combine", "merge", "--show-accepted"]) == 0
    captured = capsys.readouterr()
    assert re.sub(r"\[[12]:(.*?)\]", r"\1", captured.out, flags=re.DOTALL) == plain
    counts = [int(count) for count in re.search(r"accepted: \[1:first\] (\d+), \[2:second\] (\d+)", captured.err).groups()]
    assert min(counts) > 0


@pytest.mark.slow
def test_evaluate_combines_drafts(tmp_path, target, capsys):
    drafts = [_export_draft(target, tmp_path / "first"), _export_draft(target, tmp_path / "second", seed=2)]
    prompts = _file(tmp_path, "p.jsonl", *({"id": str(i), "source": "ab"[i % 2], "turns": ["hello"]} for i in range(4)))
    arguments = ["evaluate", "--target", target, "--prompts", prompts, "--max-new-tokens", "24", "--num-draft-tokens", "2"]
    arguments += ["--draft", *drafts, "--tree-nodes", "150", "--tree-top-k", "100"]
    merged = [*arguments, "--combine", "merge", "--out", str(tmp_path / "out")]
    assert main([*merged, "--dry-run"]) == 0
    words = capsys.readouterr().out
    assert "for 1 draft" in words and "merge: first and second, their trees merged, 150 nodes a tree" in words
    assert main([*merged, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["drafts"]
    assert list(values) == ["merge"]
    report = read_json(tmp_path / "out" / "report.json")
    assert report["combined"] == {"rule": "merge", "route_by": "confidence", "route_steps": 0, "tree_nodes": 150}
    assert report["same_text_share"] == 1.0 and len(report["alpha"]) == 2
    for figures in (report, *report["per_source"].values()):
        for share in ("verified_share", "accepted_share"):
            assert sum(figures["drafts"][name][share] for name in ("first", "second")) == pytest.approx(1)
    assert main([*arguments[:-4], "--combine", "average", "--out", str(tmp_path / "one")]) == 0
    assert "average" in capsys.readouterr().out
    assert read_json(tmp_path / "one" / "report.json")["config"]["combine"] == "average"
    other = _export_draft(target, tmp_path / "other", rope=Rope(5e5))
    wrong = ["--draft", drafts[0], other, "--combine", "merge", "--tree-nodes", "9", "--out", str(tmp_path / "no")]
    assert main([*arguments[:9], *wrong]) == 2
    assert "drafts first and other cannot be combined: rope is" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_compares_drafts_and_prints_a_table(tmp_path, target, capsys):
    drafts = [_export_draft(target, tmp_path / name) for name in ("first", "second")]
    prompts = _file(tmp_path, "p.jsonl", *({"id": str(i), "source": "ab"[i % 2], "turns": ["hello"]} for i in range(4)))
    arguments = ["evaluate", "--target", target, "--prompts", prompts, "--max-new-tokens", "24", "--num-draft-tokens", "2"]
    assert main([*arguments, "--draft", *drafts, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for word in ("first", "second", "τ [95%]", "α2", "0 first", "τ of second minus first: 0.000", "compiling"):
        assert word in out
    assert "…" not in out
    (difference,) = read_json(tmp_path / "out" / "differences.json")
    assert (difference["a"], difference["b"], difference["tau_difference"]) == ("second", "first", 0.0)
    assert read_json(tmp_path / "out" / "first" / "report.json")["per_source"].keys() == {"a", "b"}
    assert main([*arguments, "--draft", drafts[0], drafts[0], "--out", str(tmp_path / "again")]) == 2
    assert "given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    "turns, changes, words",
    [
        (["a" * 1100], {}, ["prompt p0", "exceed the context of 1024", "--max-new-tokens"]),
        ([], {}, [":1:", "turns"]),
        ([" "], {}, [":1:", "turns"]),
        (["fine"], {"hidden_size": 16}, ["hidden_size is 16", "has 32"]),
        (["fine"], {"vocab_size": 300}, ["vocab_size is 300", "has 258"]),
        (["fine"], {"rope": Rope(5e5)}, ["rope is", "theta=500000"]),
    ],
    ids=["longer than the context", "no turn", "empty turn", "hidden size", "vocabulary", "rope"],
)
def test_prompts_and_drafts_that_do_not_fit(tmp_path, target, capsys, turns, changes, words):
    draft = _export_draft(target, tmp_path / "draft", **changes)
    prompts = _file(tmp_path, "p.jsonl", {"id": "p0", "source": "s", "turns": turns})
    out = tmp_path / "out"
    assert main(["evaluate", "--target", target, "--draft", draft, "--prompts", prompts, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not out.exists()


def _options(name):
    """Options of a command by name, without those that only Python can set."""
    return {option: found for option, found in options_of(command(name).config).items() if option not in PYTHON_ONLY}


def test_one_name_one_meaning():
    """Design §5: an option has the same type and default in every command. `out` differs in what it is; what one command needs
    another may do without."""
    seen = {}
    for name in COMMANDS:
        for option, (kind, field) in _options(name).items():
            if option in ("out", "draft", "target", "selection", "run"):
                continue
            assert seen.setdefault(option, (kind, field.default)) == (kind, field.default), (name, option)
    assert {"data", "retain_ratio", "num_draft_tokens"} <= set(seen)


def test_options_are_about_sixty():
    """85 once. An option that is added here should earn its place by an experiment, or take another's; eight of these say how
    real chats are read (a template, its variables and day, bad rows, split answers, a system message and tools)."""
    names = set(options_of(OutputOptions)).union(*(_options(name) for name in COMMANDS)) - {"run", "shell"}  # positional
    assert len(names) <= 72, sorted(names)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_and_ends_with_examples(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert _exit_code([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.split("example:")[1].strip().startswith(f"jsfdd {name}")
    assert max(map(len, text.splitlines())) <= 100
    for option, (_, field) in _options(name).items():
        assert len(field.metadata["help"]) > 5 and (option in ("shell", "run") or "--" + option.replace("_", "-") in text)
    assert "--dry-run" in text and "--json" in text
    assert not any(word in text for word in ("Options(", "None", "(default: )", "(default: False)", "fixed", *PYTHON_ONLY))


def test_help_shows_groups_defaults_and_choices(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _exit_code(["train", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    for title in ("model options", "chats options", "recipe options", "output options"):
        assert title in text
    for words in ("--epochs INT Passes over the kept samples.", "(default: 10)", "--data PATH … Chats:", "(default: 0)"):
        assert words in text
    assert "--shard-optimizer Split" in text and "--no-shard-optimizer" not in text
    assert "--mask-spans {thinking,tool_calls} …" in text


def test_help_of_the_command_documents_exit_codes(capsys):
    assert _exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    for words in ("exit codes:", "  0 ", "  2 ", "  130 ", "NO_COLOR", *COMMANDS):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100
    assert _exit_code([]) == 0 and capsys.readouterr().out == text
    assert _exit_code(["--version"]) == 0 and capsys.readouterr().out[0].isdigit()


def test_help_imports_nothing_heavy():
    """Design §8: a command answers in a second and a half, of which JAX alone would take most."""
    heavy = ("jax", "flax", "transformers", "pyarrow", "optax", "huggingface_hub", "matplotlib", "safetensors")
    commands = [["--help"], ["train", "--help"], ["evaluate", "--help"], ["score", "--retain-ratio", "2"]]
    code = f"""
import contextlib, sys
from jsfdd.commands.cli import main
for arguments in {commands!r}:
    with contextlib.suppress(SystemExit):
        main(arguments)
    print(arguments, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for arguments in commands:
        assert f"{arguments} []" in done.stderr.splitlines(), done.stderr


@pytest.mark.parametrize("words, name", [(["completion", "tcsh"], "'shell'"), (["report", "--bogus"], "'run'")])
def test_an_argument_without_a_name_is_called_as_the_help_calls_it(words, name, capsys):
    with pytest.raises(SystemExit):
        main(words)
    box = capsys.readouterr().err.splitlines()
    assert name in "".join(box) and "config" not in "".join(box)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_know_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "retain-ratio" in script and "evaluate" in script and "dry-run" in script
    if shell == "bash":
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.slow
def test_no_color():
    """On a terminal the help is coloured, unless NO_COLOR says otherwise."""
    code = "from jsfdd.commands.cli import main; main(['completion', '--help'])"
    for no_color, coloured in (("", True), ("1", False)):
        reader, terminal = os.openpty()
        environment = os.environ | {"NO_COLOR": no_color, "TERM": "xterm"}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=terminal)
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
            while part := os.read(reader, 4096):
                shown += part
        os.close(reader)
        assert process.wait() == 0 and b"Print a completion script" in shown
        assert (b"\x1b[" in shown) == coloured


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert main(["demo"]) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--help"], ["completion", "bash"], ["select", "--scores", "SCORES", "--out", "OUT", "--dry-run"]]
)
def test_a_reader_that_leaves_early_is_no_fault(tmp_path, arguments):
    """As in `jsfdd … | head`: output that nobody reads any more ends the command without a word."""
    columns = {name: np.arange(1.0, 5.0) for name in column_names()}
    ids = tuple("abcd")
    table = ScoreTable(ids, ids, np.ones(4, np.int32), columns, identity={})
    write_scores(tmp_path / "scores.parquet", table)
    names = {"SCORES": str(tmp_path / "scores.parquet"), "OUT": str(tmp_path / "out")}
    command = [sys.executable, "-m", "jsfdd.commands.cli", *(names.get(word, word) for word in arguments)]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]
    assert (done.returncode, said) == (141, [])


def test_scores_as_json(tmp_path, target, capsys):
    """stdout is one line of JSON; what was read, kept and skipped is on stderr and in the JSON, without any text of a chat."""
    question, answer = {"role": "user", "content": "I am Ada"}, {"role": "assistant", "content": "Hello Ada<|im_end|>"}
    secret = {"messages": [question, answer]}
    data = _file(tmp_path, "chats.jsonl", GOOD, GOOD, secret)
    assert main(["score", "--target", target, "--data", data, "--out", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert (result["command"], result["samples"], result["scores"]) == ("score", 1, str(tmp_path / "out" / "scores.parquet"))
    assert "features" not in result
    [counts] = result["files"]
    assert (counts["read"], counts["kept"], counts["duplicates"], counts["special_text"]) == (3, 1, 1, 1)
    assert f"{data}: 3 read, 1 kept; skipped: 1 duplicates, 1 with a special token's text" in captured.err
    assert "Ada" not in captured.out + captured.err


@pytest.mark.parametrize("error, said", [
    (FileExistsError(17, "File exists", "b/file"), "b/file: file exists; it is a file where a directory is to be"),
    (PermissionError(13, "Permission denied", "b/ro/o"), "b/ro/o: permission denied; check who may read or write it"),
    (FileNotFoundError(2, "No such file or directory", "x"), "x: no such file or directory; check the path"),
    (FileNotFoundError("x: no such file; score first"), "x: no such file; score first"),
])  # fmt: skip
def test_what_the_system_says_of_a_file_has_a_remedy_too(monkeypatch, capsys, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.startswith(f"jsfdd: error: {said}")


def test_programs_are_cached_beside_those_of_earlier_versions(tmp_path):
    """JAX stores nothing in a bounded cache that holds a program without the time of its last use."""
    old = tmp_path / "jsfdd" / "xla" / "jit_step-1-cache"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an unbounded cache")
    script = "from jsfdd.commands.cli import _prepare_jax; _prepare_jax(); import jax; jax.jit(lambda x: x + 1)(1)"
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    subprocess.run([sys.executable, "-W", "error", "-c", script], env=env | {"XDG_CACHE_HOME": str(tmp_path)}, check=True)
    kept = {path.name.rpartition("-")[2] for path in tmp_path.glob("jsfdd/*/jit__lambda*")}
    assert kept == {"cache", "atime"}
