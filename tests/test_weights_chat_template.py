"""A target's chat template is one text, into which its variables and its day are written."""

import datetime
import json

import pytest
from families import FAMILIES, family_tokenizer
from toy import write_target

from jsfdd.weights.chat_template import TemplateOptions, settle_template
from jsfdd.weights.target import describe_target

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def rendered(family, **options):
    tokenizer = family_tokenizer(family)
    tokenizer.chat_template = settle_template(tokenizer.chat_template, TemplateOptions(**options), "t")
    return tokenizer.apply_chat_template(CHAT, tokenize=False), tokenizer.apply_chat_template(
        CHAT[:1], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_day_is_written_as_the_clock_would(family, monkeypatch):
    """Every day that a template could ask for is that day, now and later; nothing else changes."""
    from transformers.utils import chat_template_utils

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 5, 9)

    fixed = rendered(family, date="2026-05-09")
    monkeypatch.setattr(chat_template_utils, "datetime", Day)
    assert fixed == rendered(family) == rendered(family, date="2026-05-09")
    asks = "strftime_now" in FAMILIES[family].template
    assert (rendered(family, date="2024-07-26") != fixed) == asks


def test_every_code_of_a_day():
    codes = "%a %A %b %B %d %-d %e %m %-m %y %Y %j %-j %H:%M:%S %I %p %x %F %D %T %R %u %V %h"
    template = "{{ strftime_now('" + codes + "') }}"
    tokenizer = family_tokenizer("smollm2")
    tokenizer.chat_template = settle_template(template, TemplateOptions(date="2026-05-09"), "t")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == datetime.datetime(2026, 5, 9).strftime(codes)
    with pytest.raises(ValueError, match="--date: got '9 May 2026', but it must be a day as YYYY-MM-DD"):
        settle_template(template, TemplateOptions(date="9 May 2026"), "t")


def test_variables_are_those_that_transformers_would_be_given():
    kwargs = {"enable_thinking": False, "n": 1.5, "nothing": None, "text": 'a "b" \\ %} {{ é\n', "many": ["x", {"k": True}]}
    template = "\n  {% for m in messages %}{{ [enable_thinking, n, nothing, text, many] | tojson }}\n{% endfor %}"
    tokenizer = family_tokenizer("smollm2")
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, **kwargs)
    tokenizer.chat_template = settle_template(template, TemplateOptions(kwargs=kwargs), "t")
    assert (
        tokenizer.apply_chat_template(CHAT, tokenize=False) == expected
        and json.dumps("é\n", ensure_ascii=False)[1:-1] in expected
    )
    assert rendered("qwen3", kwargs={"enable_thinking": False})[1].endswith("assistant\n<think>\n\n</think>\n\n")
    for name in ("messages", "tools", "a b", "none", "for"):
        with pytest.raises(ValueError, match=f"--template-kwargs: '{name}' is no name of a variable"):
            settle_template(template, TemplateOptions(kwargs={name: 1}), "t")


def test_named_templates(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    named = {"default": "plain {{ messages[0].content }}\n", "tool_use": "{{ tools[0].function.name }}\n", "rag": "rag"}
    tokenizer = family_tokenizer("smollm2")
    tokenizer.chat_template = named
    expected = [tokenizer.apply_chat_template(CHAT, tools=given, tokenize=False) for given in (None, tools)]
    assert expected == ["plain hi", "f"]
    tokenizer.chat_template = settle_template(named, TemplateOptions(), "t")
    assert [tokenizer.apply_chat_template(CHAT, tools=given, tokenize=False) for given in (None, tools)] == expected
    assert settle_template(named, TemplateOptions("rag"), "t") == "rag"
    assert (
        settle_template({"default": "d"}, TemplateOptions(), "t") == "d"
        and settle_template(None, TemplateOptions(), "t") is None
    )
    with pytest.raises(
        FileNotFoundError, match="rug: no such file, and no chat template of t, which has 'default', 'tool_use'"
    ):
        settle_template(named, TemplateOptions("rug"), "t")
    with pytest.raises(ValueError, match="t: several chat templates .'rag'. and none named 'default'; name one"):
        settle_template({"rag": "rag"}, TemplateOptions(), "t")


def test_a_template_in_the_processors_file(tmp_path):
    """Where models that also read images keep it; the tokenizer's own comes first."""
    directory = write_target(tmp_path / "target")
    own = describe_target(str(directory)).tokenizer.chat_template
    (directory / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    assert describe_target(str(directory)).tokenizer.chat_template == own
    (directory / "chat_template.jinja").unlink()
    assert describe_target(str(directory)).tokenizer.chat_template == "of the processor"
    (directory / "chat_template.json").write_text("{}")
    with pytest.raises(ValueError, match="no chat template in it"):
        describe_target(str(directory))


@pytest.mark.parametrize("layout", ["list", "directory"])
def test_a_target_with_named_templates(tmp_path, layout):
    directory = write_target(tmp_path / "target")
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    templates = {"default": "plain {{ messages[0].content }}", "tool_use": "with {{ tools | length }}"}
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if layout == "list":
        settings["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    else:
        (directory / "chat_template.jinja").write_text(templates["default"])
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text(templates["tool_use"])
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = describe_target(str(directory)).tokenizer
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "plain hi"
    assert tokenizer.apply_chat_template(CHAT, tools=[{"name": "f"}], tokenize=False) == "with 1"
    other = describe_target(str(directory), TemplateOptions("tool_use")).tokenizer
    assert other.chat_template == templates["tool_use"]
