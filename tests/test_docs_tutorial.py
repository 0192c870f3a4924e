"""The commands of docs/tutorial.md run as they stand there, one after another, on a toy in place of the real target."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from toy import loaded_target, toy_target, write_prompts, write_target

from jsfdd.base.files import read_json
from jsfdd.commands.cli import main
from jsfdd.weights.draft import load_draft

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCKS = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
SHOWN = [line.removeprefix("$ ") for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line[:2] == "$ "]
COMMANDS = [shlex.split(line) for line in SHOWN if line.startswith("jsfdd ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The directory in which the page begins: a target of eight layers, ShareGPT's rows, prompts."""
    folder = tmp_path_factory.mktemp("tutorial")
    config, params = toy_target(0, vocab_size=258, max_position=1024, num_layers=8)
    write_target(folder / "SmolLM2-135M-Instruct", target=loaded_target()._replace(config=config, params=params))
    rows = [
        {"id": f"r{i}", "conversations": [{"from": "human", "value": f"Why {i}?"}, {"from": "gpt", "value": "Because."}]}
        for i in range(40)
    ]
    (folder / "sharegpt.json").write_text(json.dumps(rows), encoding="utf-8")
    write_prompts(folder / "prompts.jsonl")
    return folder


def test_the_commands_run_and_leave_what_the_page_says(place, monkeypatch):
    monkeypatch.chdir(place)
    for words in COMMANDS:
        assert main(words[1:]) == 0, " ".join(words)
    assert {words[1] for words in COMMANDS} == {"respond", "select", "train", "doctor", "evaluate", "export"}
    selection, report = read_json(place / "selection.json", dict), read_json(place / "evaluated" / "report.json", dict)
    assert len(selection["ids"]) == 20 and selection["within"] == "cluster"
    assert report["same_text_share"] == 1.0 and report["tau"] >= 1
    assert load_draft(place / "draft-vllm", 8).config.kind == "eagle3"
    assert "vllm serve" in (place / "draft-vllm" / "README.md").read_text(encoding="utf-8")
