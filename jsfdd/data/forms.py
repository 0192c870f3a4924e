"""The forms that chat rows are published in, and the messages that each stands for.

    {"messages": [{"role": "user", "content": "…"}, …]}                OpenAI
    {"conversations": [{"from": "human", "value": "…"}, …]}            ShareGPT (or with OpenAI's role and content)
    {"instruction": "…", "input": "…" (optional), "output": "…"}       Alpaca
    {"prompt": "…", "response": "…"}, or "completion" for "response"   plain pairs; each a text or a list of messages

A row has exactly one of "messages", "conversations" and "instruction"; "prompt" is looked at where it has none of them,
because datasets of messages often repeat the first one as their prompt. A text "system" beside any form becomes the
first message, unless the row has a system message already. Other keys are not read, schemas of tools among them.

Roles are system, user, assistant and tool, as chat templates know them; "developer" means system, "function" and
ShareGPT's "observation" mean tool, "human" user, "gpt", "chatgpt" and "function_call" assistant. Content is a text, or
OpenAI's list of text parts. An assistant message may have `tool_calls` (or the older `function_call`), and may then lack
content; arguments may be an object or JSON text. `"truncated": true` in an assistant message says that its text was cut
short (`jsfdd respond` writes it): the text counts, the end-of-turn token that a template puts after it does not.
"""

from __future__ import annotations

import json
from typing import Literal, TypedDict

from jsfdd.data.rows import check_text, kind_of

_LISTS = ("messages", "conversations")
_ANSWERS = ("response", "completion")
COLUMNS = (*_LISTS, "instruction", "input", "output", "prompt", *_ANSWERS, "system")

_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "developer": "system", "function": "tool",
}  # fmt: skip
_SHAREGPT_ROLES = _ROLES | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant", "observation": "tool",
}  # fmt: skip
_SHOWN = 30  # characters of an unknown role that an error shows: a misplaced message must not end up in a log
_KIND_NAMES = {str: "a string", list: "a list", dict: "an object"}


class Message(TypedDict, total=False):
    """One turn of a conversation, as chat templates take it. `role` and `content` are always there."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: list[dict]  # {"type": "function", "function": {"name": str, "arguments": dict or str}, "id"?: str}
    tool_call_id: str
    name: str
    truncated: bool  # of an answer that was cut short; there only if it is true


def messages_of(row: dict, place: str) -> tuple[Message, ...]:
    """The conversation of a chat row in any of the forms; ValueError names `place` and what is wrong."""
    present = [key for key in (*_LISTS, "instruction") if key in row] or [key for key in ("prompt",) if key in row]
    if len(present) != 1:
        found = " and ".join(map(repr, present)) or "none of them"
        raise ValueError(
            f"{place}: a chat row has exactly one of 'messages', 'conversations', 'instruction', 'prompt'; found {found}"
        )
    (key,) = present
    if key == "instruction":
        instruction, answer = _text(row, "instruction", place), _text(row, "output", place)
        extra = _text(row, "input", place) if "input" in row else ""
        question = f"{instruction}\n\n{extra}" if extra else instruction
        messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    elif key == "prompt":
        answers = [name for name in _ANSWERS if name in row]
        if len(answers) != 1:
            found = " and ".join(map(repr, answers)) or "neither"
            raise ValueError(f"{place}: beside 'prompt' a row has one of 'response', 'completion'; found {found}")
        messages = _side(row, "prompt", "user", place) + _side(row, answers[0], "assistant", place)
    else:
        messages = _turns(row, key, place)
    system = row.get("system", "")
    check_text(system, "'system'", place)
    if system and all(message["role"] != "system" for message in messages):
        messages = (Message(role="system", content=system), *messages)
    return messages


def text_of_calls(calls: list[dict]) -> str:
    """Tool calls as text, for chat templates that know none: one `<tool_call>` element of JSON a call (Hermes, Qwen)."""
    bare = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
    return "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in bare)


def _side(row: dict, key: str, role: str, place: str) -> tuple[Message, ...]:
    """One side of a plain pair: a text is one message of `role`."""
    return _turns(row, key, place) if isinstance(row[key], list) else (Message(role=role, content=_text(row, key, place)),)


def _turns(row: dict, key: str, place: str) -> tuple[Message, ...]:
    turns = _field(row, key, list, place)
    if not turns:
        raise ValueError(f"{place}: the conversation is empty; add messages or drop the row")
    return tuple(_message(turn, key == "conversations", f"{place}: message {i}") for i, turn in enumerate(turns, 1))


def _message(turn: object, sharegpt: bool, where: str) -> Message:
    sharegpt = sharegpt and not (isinstance(turn, dict) and "role" in turn)
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {kind_of(turn)}; expected {{{role_key!r}: …, {content_key!r}: …}}")
    role, roles = _text(turn, role_key, where), _SHAREGPT_ROLES if sharegpt else _ROLES
    if role not in roles:
        raise ValueError(f"{where} has the unknown role {role[:_SHOWN]!r}; use one of {', '.join(roles)}")
    message = Message(role=roles[role], content="")
    calls = _calls(turn, where) if message["role"] == "assistant" else []
    if calls:
        message["tool_calls"] = calls
    if not calls or turn.get(content_key) is not None:
        message["content"] = _content(turn, content_key, where)
    truncated = turn.get("truncated")
    if message["role"] == "assistant" and truncated is not None:
        if not isinstance(truncated, bool):
            raise ValueError(f"{where}: 'truncated' is {kind_of(truncated)}; expected true or false")
        message |= {"truncated": True} if truncated else {}
    for key in ("tool_call_id", "name"):  # some templates ask for them
        if message["role"] == "tool" and turn.get(key) is not None:
            message[key] = _text(turn, key, where)
    return message


def _content(turn: dict, key: str, where: str) -> str:
    """A message's text; of OpenAI's parts, all texts together."""
    if not isinstance(turn.get(key), list):
        return _text(turn, key, where)
    texts = []
    for number, part in enumerate(turn[key], 1):
        if not isinstance(part, dict):
            raise ValueError(f"{where}: {key!r} is a list; expected a string or a list of parts {{'type': 'text', 'text': …}}")
        if part.get("type") != "text":
            raise ValueError(f"{where}: part {number} is no text; only text can be learned from: drop the row")
        texts.append(_text(part, "text", f"{where}: part {number}"))
    return "".join(texts)


def _calls(turn: dict, where: str) -> list[dict]:
    """A message's tool calls in the shape that templates expect; empty if it has none."""
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if not isinstance(calls, list):
        raise ValueError(f"{where}: 'tool_calls' is {kind_of(calls)}; expected a list")
    found = []
    for number, call in enumerate(calls, 1):
        place = f"{where}: tool call {number}"
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict):
            raise ValueError(f"{place} is {kind_of(function)}; expected {{'function': {{'name': …, 'arguments': …}}}}")
        name, arguments = _text(function, "name", place), function.get("arguments", {})
        if not isinstance(arguments, dict):
            check_text(arguments, "'arguments'", place)
            arguments = _object_or_text(arguments)
        shaped = {"type": "function", "function": {"name": name, "arguments": arguments}}
        found.append(shaped | ({"id": _text(call, "id", place)} if call.get("id") is not None else {}))
    return found


def _object_or_text(text: str) -> dict | str:
    """Arguments as templates expect them; a model may have written some that are no JSON object: they stay text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _field(row: dict, key: str, kind: type, place: str):
    if key not in row:
        raise ValueError(f"{place}: {key!r} is missing; add it or drop the row")
    if not isinstance(row[key], kind):
        raise ValueError(f"{place}: {key!r} is {kind_of(row[key])}; expected {_KIND_NAMES[kind]}")
    return row[key]


def _text(row: dict, key: str, place: str) -> str:
    text = _field(row, key, str, place)
    check_text(text, repr(key), place)
    return text
