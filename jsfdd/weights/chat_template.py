"""Combine a target's chat template and the user's options into one Jinja text.

A checkpoint may have several named templates; the user may give another one, variables, and a date. All of these are written
into the text. So the tokenizer's `chat_template` alone determines every rendering, and does not depend on the day.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # set by whoever renders, so the user may not set them
_WORDS = ("none", "true", "false", "not", "and", "or", "in", "is", "if", "else", "for")  # Jinja's own words
_CODES = "aAbBcdDeFGhHIjmMnprRStTuUVwWxXyYzZ"  # strftime's codes


class TemplateOptions(NamedTuple):
    """The user's options for a target's chat template.

    Attributes:
      template: a file with a Jinja template, or the name of one of the checkpoint's templates; None for the usual one.
      kwargs: variables that the template reads, as in {"enable_thinking": False}.
      date: YYYY-MM-DD, what the template takes for today; None leaves it to the clock.
    """

    template: str | Path | None = None
    kwargs: Mapping[str, object] | None = None
    date: str | None = None


def settle_template(templates: str | Mapping[str, str] | None, options: TemplateOptions, location: Path) -> str | None:
    """The template to render with.

    Args:
      own: the tokenizer's, or several by name.
      where: of the tokenizer, for errors.

    Returns None if there is none. Raises FileNotFoundError and ValueError, which name the file.
    """
    template = _chosen(templates, options.template, location)
    if template is None:
        return None
    if options.date is not None and "strftime_now" in template:
        template = _clock(options.date) + template
    if options.kwargs:
        template = "".join(_variable(name, value) for name, value in options.kwargs.items()) + template
    return template


def read_chat_template(path: Path) -> str:
    """A chat template from a file of its own, as Jinja text.

    Raises:
      FileNotFoundError: no such file.
      ValueError: empty, not UTF-8, or no Jinja template; the message names the line.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    from jsfdd.data.render import within_limits  # a start without a template of its own needs no room of data

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check --chat-template")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); --chat-template takes a Jinja template as plain text") from error
    if not text.strip():
        raise ValueError(f"{path}: empty; --chat-template takes a Jinja template")
    try:
        with within_limits(str(path)):
            render_jinja_template([], chat_template=text)  # compiles the template without rendering it
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: not a Jinja template: {error.message}") from error
    return text


def parse_date(text: str) -> datetime.date:
    """Raise ValueError unless the text is YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"--date: got {text!r}, but it must be a day as YYYY-MM-DD ({error})") from error


def _chosen(templates: str | Mapping[str, str] | None, wanted: str | Path | None, location: Path) -> str | None:
    named = templates if isinstance(templates, Mapping) else {}
    if wanted is not None:
        if str(wanted) in named and not Path(wanted).is_file():
            return named[str(wanted)]
        if named and not Path(wanted).is_file():
            names = ", ".join(map(repr, named))
            raise FileNotFoundError(f"{wanted}: no such file, and no chat template of {location}, which has {names}")
        return read_chat_template(Path(wanted))
    if not named:
        return templates if isinstance(templates, str) else None
    if "default" not in named:
        names = ", ".join(map(repr, named))
        raise ValueError(
            f"{location}: several chat templates ({names}) and none named 'default'; name one with --chat-template"
        )
    if "tool_use" not in named:
        return named["default"]
    # transformers chooses alike: tool_use renders conversations with definitions of tools, default all others.
    return f"{{% if tools %}}\n{_ended(named['tool_use'])}{{% else %}}\n{_ended(named['default'])}{{% endif %}}"


def _ended(template: str) -> str:
    """A template without its last line break, which Jinja drops at the end of a text and nowhere else."""
    return template.removesuffix("\n")


def _clock(date: str) -> str:
    """`strftime_now` as a macro that always writes one day, at midnight. Jinja drops the line break behind the tag."""
    day = datetime.datetime.combine(parse_date(date), datetime.time())
    written = {f"%-{code}": str(int(day.strftime(f"%{code}"))) for code in "dmHIMSjy"}
    written |= {f"%{code}": day.strftime(f"%{code}") for code in _CODES}
    replaced = "".join(f" | replace({_literal(code)}, {_literal(text)})" for code, text in written.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


def _variable(name: str, value: object) -> str:
    if not name.isidentifier() or name in (*_GIVEN, *_WORDS):
        raise ValueError(f"--template-kwargs: {name!r} is no name of a variable that a chat template could be given")
    return f"{{% set {name} = {_literal(value)} %}}\n"


def _literal(value: object) -> str:
    """A JSON value as Jinja writes it. Only null is written differently."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
