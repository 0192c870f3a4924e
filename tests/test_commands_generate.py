"""A system message and tools reach the chat template, from the command line and from a file of prompts alike."""

import json

import pytest
from families import TOOLS, family_tokenizer
from toy import loaded_target, toy_target, write_target

from jsfdd.base.records import Prompt
from jsfdd.commands import generate
from jsfdd.commands.cli import main
from jsfdd.commands.generate import GenerateConfig
from jsfdd.commands.options import from_options
from jsfdd.data.chat import read_prompts
from jsfdd.data.template import render_prompt
from jsfdd.decoding.prompts import first_prompts
from jsfdd.weights.target import describe_target


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A target with Qwen-3's template, which writes both."""
    tokenizer = family_tokenizer("qwen3")
    config, params = toy_target(vocab_size=len(tokenizer), max_position=1024)
    target = loaded_target()._replace(config=config, params=params, tokenizer=tokenizer)
    return write_target(tmp_path_factory.mktemp("qwen3"), target=target)


def test_system_and_tools_are_part_of_the_prompt(directory, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    options = {"target": str(directory), "prompt": "weather?", "system": "Be kind.", "tools": tmp_path / "tools.json"}
    _, tokens = generate.prepare(from_options(GenerateConfig, **options))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "weather?"}]
    target = describe_target(str(directory))
    expected = render_prompt(target.tokenizer, messages, TOOLS)
    assert tokens == expected and "Be kind." in target.tokenizer.decode(tokens) and "weather" in target.tokenizer.decode(tokens)

    row = {"turns": ["weather?"], "system": "Be kind.", "tools": TOOLS}
    (tmp_path / "p.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({"messages": messages, "functions": json.dumps(TOOLS)})
    )
    prompts = read_prompts([tmp_path / "p.jsonl"])
    assert first_prompts(target, prompts, 4) == [expected, expected]
    plain = first_prompts(target, [Prompt("x", "", ("weather?",))], 4)
    assert plain == [render_prompt(target.tokenizer, messages[1:])] != [expected]


@pytest.mark.parametrize(
    "text, words",
    [(None, "no such file; give a JSON file"), ("{", "is no definition with a name"), ("[]", "no definition of a")],
)
def test_tools_that_are_none_are_named(directory, tmp_path, capsys, text, words):
    file = tmp_path / "tools.json"
    if text is not None:
        file.write_text(text)
    assert main(["generate", "--target", str(directory), "--prompt", "hi", "--tools", str(file)]) == 2
    assert f"{file}: " in (said := capsys.readouterr().err) and words in said
