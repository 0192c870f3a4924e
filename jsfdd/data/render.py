"""Render a conversation with a tokenizer's chat template.

Templates come with checkpoints, so they are foreign programs. They run in transformers' sandbox, with limits of time and of
memory. An error in one counts as a refusal of the conversation. One that exceeds a limit ends the command: it would do so
again at the next conversation.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence

import jinja2
import jinja2.ext

from jsfdd.base.limits import limited
from jsfdd.data.messages import Message

_SECONDS = 10.0  # a real conversation renders in milliseconds
_MEMORY = 1 << 30
_LONGEST = 64 << 20  # characters
_TOGETHER = 16  # conversations
# What a template can raise: its own errors, and those of the expressions that its author wrote. Others are faults of ours.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
_SHOWN = 160  # characters of a template's complaint, which may quote a message


class RefusedByTemplate(ValueError):
    """The chat template refuses the conversation, usually because of the order of its roles."""


class BoundlessTemplate(ValueError):
    """The chat template takes more time or memory than any real one."""


@contextlib.contextmanager
def within_limits(name: str) -> Iterator[None]:
    """Limits around whatever compiles or runs a chat template; `name` of its file or checkpoint.

    Raises BoundlessTemplate, in the main thread (`base.limits`).
    """
    try:
        with limited(_SECONDS, _MEMORY):
            yield
    except (TimeoutError, MemoryError) as error:
        what = f"{_SECONDS:.0f} s" if isinstance(error, TimeoutError) else f"{_MEMORY >> 30} GB of memory"
        raise BoundlessTemplate(
            f"{name}: its chat template takes more than {what} for one conversation, as no sound one does; give another "
            "with --chat-template FILE"
        ) from None


def check_tokenizer(tokenizer) -> None:
    """Raise ValueError if the tokenizer has no chat template, or cannot map characters to tokens."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer, without offsets; load it with use_fast=True")
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; use an instruction-tuned model's tokenizer or set its chat_template"
        )
    if not isinstance(tokenizer.chat_template, str):
        names = ", ".join(map(repr, tokenizer.chat_template))
        raise ValueError(f"the tokenizer has several chat templates ({names}); set its chat_template to one of them")
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag]).parse(tokenizer.chat_template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template has a syntax error in line {error.lineno}: {error.message:.{_SHOWN}}") from error
    except RecursionError:
        raise ValueError("the chat template nests too deep to be read") from None


def render(tokenizer, messages: Sequence[Message], tools: Sequence[dict] = (), *, prompt: bool = False) -> str:
    """Render the text of a conversation; with `prompt`, up to where the assistant's next answer begins.

    Arguments of calls are objects; a template that joins them to text as they are gets them as JSON text.

    Raises RefusedByTemplate for whatever the template raises, and BoundlessTemplate where it takes too much time or memory.
    """
    try:
        with within_limits(tokenizer.name_or_path or "the target's tokenizer"):
            try:
                text = _apply(tokenizer, messages, tools, prompt)
            except TypeError:
                as_text = [with_text_arguments(message) for message in messages]
                if as_text == list(messages):
                    raise
                text = _apply(tokenizer, as_text, tools, prompt)
    except BoundlessTemplate:
        raise
    except TEMPLATE_ERRORS as error:
        raise RefusedByTemplate(_short(error)) from error
    if len(text) > _LONGEST:
        raise RefusedByTemplate(f"it writes {len(text):,} characters")
    return text


def render_together(tokenizer, conversations: Sequence[Sequence[Message]]) -> list[str | None]:
    """What `render` gives for conversations without tools, in half the time: limits are set and settings looked up once for
    several. None where `render` has to say what is wrong, with that conversation or with another one of its group.
    """
    texts: list[str | None] = []
    for begin in range(0, len(conversations), _TOGETHER):
        group = [list(messages) for messages in conversations[begin : begin + _TOGETHER]]
        try:
            with within_limits(""):
                texts += tokenizer.apply_chat_template(group, tokenize=False)
        except TEMPLATE_ERRORS:  # those of a template without bounds are among them
            texts += [None] * len(group)
    return [text if text is not None and len(text) <= _LONGEST else None for text in texts]


def render_prompt(tokenizer, messages: Sequence[Message], tools: Sequence[dict] = ()) -> list[int]:
    """Token ids of a conversation so far, up to where the assistant's answer begins.

    The ids are those of `apply_chat_template(messages, tools=…, add_generation_prompt=True)`, as servers compute them:
    text of a special token in a message becomes that token. Raises RefusedByTemplate if the template refuses the messages.
    """
    check_tokenizer(tokenizer)
    try:
        text = render(tokenizer, messages, tools, prompt=True)
    except RefusedByTemplate as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RefusedByTemplate(f"the chat template refuses a prompt with the roles {roles}: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(arguments, ensure_ascii=False)}}
        if isinstance(arguments := call["function"]["arguments"], dict)
        else call
        for call in message["tool_calls"]
    ]
    return Message(**message | {"tool_calls": calls})


def _apply(tokenizer, messages, tools, prompt) -> str:
    return tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, add_generation_prompt=prompt, tokenize=False
    )


class _GenerationTag(jinja2.ext.Extension):
    """Render `{% generation %} … {% endgeneration %}`, a tag of transformers, as its plain contents."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
