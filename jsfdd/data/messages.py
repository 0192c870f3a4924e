"""Convert the messages of datasets, in all their spellings, to the form that chat templates take.

Roles are system, user, assistant and tool, as chat templates know them; "developer" means system, "function" and ShareGPT's
"observation" mean tool, "human" user, "gpt", "chatgpt", "model" and "function_call" assistant; capital letters make no
difference. They stand under "role" or "from". Content, under "content" or "value", is a text, or a list of parts of text. In
an assistant's message

    reasoning_content, reasoning, thinking    its thought, also as a part {"type": "thinking"} of the content
    tool_calls, function_call                 calls of tools; the arguments are an object or JSON text
    "weight": 0, "train": false               the answer is context: it is read and does not count; also "loss", "training",
                                              "trainable", "train_on", "loss_weight", "loss_mask"
    "truncated": true                         the text was cut short (`jsfdd respond` writes it): the text counts, the
                                              end-of-turn token that a template puts after it does not

A ShareGPT turn from "function_call" is a call, its text {"name": …, "arguments": …}; calls and texts of the assistant that
follow each other are one message, as they are in one turn of the target's.

Nothing that changes what a message means is passed over: images and the like, weights between 0 and 1, and calls that are
none make a `BadRow`. A null is a missing key.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from jsfdd.data.skipped import BadRow

_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "developer": "system", "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant", "function-call": "assistant", "tool_call": "assistant", "tool-call": "assistant",
    "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool", "tool-response": "tool",
    "function_response": "tool", "function-response": "tool",
}  # fmt: skip
_USUAL_ROLES = ("system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation")  # for errors
_CALLERS = ("function_call", "function-call", "tool_call", "tool-call")  # roles whose text is a call
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_WEIGHTS = ("weight", "train", "training", "trainable", "train_on", "loss", "loss_weight", "loss_mask")
_OF_ALL = {"role", "from", "content", "value", "name", *_WEIGHTS}  # keys that are read of every message
_PLAIN_KEYS, _PLAIN_ROLES = {"role", "content"}, {"system", "user", "assistant"}
_READ = {
    "assistant": {*_OF_ALL, *_THOUGHTS, "tool_calls", "function_call", "truncated"},
    "tool": {*_OF_ALL, "tool_call_id"},
}
# Keys of a row or a message that name images, films or sounds.
MEDIA = {
    f"{medium}{plural}{form}"
    for medium in ("image", "img", "video", "audio")
    for plural in ("", "s")
    for form in ("", "_url", "_urls", "_path", "_paths", "_file", "_files", "_bytes", "_base64", "_data")
} | {"pixel_values"}
_SHOWN = 30  # characters of an unknown role that an error shows: a misplaced message must not end up in a log
_KINDS = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}


class Message(TypedDict, total=False):
    """One turn of a conversation, as chat templates take it. `role` and `content` are always there."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning_content: str
    tool_calls: list[dict]  # {"type": "function", "function": {"name": str, "arguments": dict or str}, "id"?: str}
    tool_call_id: str
    name: str
    truncated: bool  # an answer that was cut short; there only if true
    weight: int  # 0 for an answer that is only context; there only then


def messages_from(turns: Sequence[object], place: str) -> tuple[Message, ...]:
    """The messages of a list of turns; `place` is of the row, for errors. Raises BadRow."""
    if not turns:
        raise BadRow("empty", place, "the conversation is empty; add messages or drop the row")
    messages: list[Message] = []
    calls = False
    for number, turn in enumerate(turns, 1):
        message = _plain(turn)
        if message is None:
            message = _message(turn, f"{place}: message {number}")
            calls |= _is_caller(turn)
            if _is_caller(turn) and messages and messages[-1]["role"] == "assistant":
                last = messages[-1]
                last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]
                continue
        messages.append(message)
    if calls:
        _number_calls(messages)
    return tuple(messages)


def unread_keys(turns: Sequence[dict]) -> set[str]:
    """The keys of a list of turns that say something and are not read."""
    keys: set[str] = set()
    for turn in turns:
        if turn.keys() == _PLAIN_KEYS:
            continue
        filled = {key for key, value in turn.items() if value not in (None, "", [], {})}
        keys |= filled - _READ.get(_ROLES[_role_in(turn)], _OF_ALL)
        keys |= {
            other
            for key, other in (("role", "from"), ("content", "value"))
            if {key, other} <= filled and turn[key] != turn[other]
        }
    return keys


def check_text(value: object, what: str, place: str) -> None:
    """Raise BadRow unless the value is a string that UTF-8 can hold: JSON's escapes can spell half a surrogate pair."""
    if not isinstance(value, str):
        raise BadRow("no_text", place, f"{what} is {kind_of(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            "no_text", place, f"{what} holds half a surrogate pair at character {error.start}; remove it or write the character"
        ) from error


def text_in(row: dict, key: str, place: str) -> str:
    """The text under a key that has to be there."""
    if row.get(key) is None:
        raise BadRow("no_text", place, f"{key!r} is missing; add it or drop the row")
    check_text(row[key], repr(key), place)
    return row[key]


def kind_of(value: object) -> str:
    """What a JSON value is, in words; columnar files may hold others."""
    return "null" if value is None else _KINDS.get(type(value), f"of type {type(value).__name__}")


def text_of_calls(calls: list[dict]) -> str:
    """Tool calls as text, for chat templates that know none: one `<tool_call>` element of JSON a call (Hermes, Qwen)."""
    bare = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
    return "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in bare)


def check_no_media(values: dict, place: str) -> None:
    """BadRow if one of the keys that name images, films or sounds has a value."""
    for key in values.keys() & MEDIA:
        if values[key] not in (None, [], "", {}):
            raise BadRow("media", place, f"{key!r} is given; only text can be learned from: drop the row")


def object_or_text(text: str) -> Any:
    """JSON text as the object or list that it holds; anything else stays as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict | list) else text


def _plain(turn: object) -> Message | None:
    """The message of a turn that has a usual role, a text of ASCII and nothing else, as most have: that is read in a tenth of
    the time. None for any other turn."""
    if isinstance(turn, dict) and turn.keys() == _PLAIN_KEYS:
        role, content = turn["role"], turn["content"]
        if type(role) is str and role in _PLAIN_ROLES and type(content) is str and content.isascii():
            return Message(role=role, content=content)
    return None


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("no_form", where, f"found {kind_of(turn)}; expected {{'role': …, 'content': …}}")
    role_text = text_in(turn, "from" if turn.get("role") is None and "from" in turn else "role", where)
    role = _role_in(turn)
    if role not in _ROLES:
        raise BadRow("unknown_role", where, f"unknown role {role_text[:_SHOWN]!r}; use one of {', '.join(_USUAL_ROLES)}")
    key = "value" if turn.get("content") is None and "value" in turn else "content"
    check_no_media(turn, where)
    message = Message(role=_ROLES[role], content="")
    if turn.get("name") is not None:  # some templates write it
        message["name"] = text_in(turn, "name", where)
    if role in _CALLERS and turn.get("tool_calls") is None:
        value = turn.get(key)
        message["tool_calls"] = _calls_in_text(value if isinstance(value, dict | list) else text_in(turn, key, where), where)
        return message | _weight(turn, where)
    text, thought = _content(turn, key, where)
    if message["role"] != "assistant":
        message["content"] = _due(text, key, where)
        if message["role"] == "tool" and turn.get("tool_call_id") is not None:
            message["tool_call_id"] = text_in(turn, "tool_call_id", where)
        return message
    calls = _calls(turn, where)
    thought = _thought(turn, where) or thought
    message["content"] = text or "" if calls or thought else _due(text, key, where)
    return message | _given(reasoning_content=thought, tool_calls=calls) | _weight(turn, where) | _truncated(turn, where)


def _role_in(turn: dict) -> str:
    """The form in which a role is looked up: upper and lower case make no difference."""
    role = turn.get("from") if turn.get("role") is None else turn["role"]
    return role.strip().lower() if isinstance(role, str) else ""


def _due(text: str | None, key: str, where: str) -> str:
    if text is None:
        raise BadRow("no_text", where, f"{key!r} is missing; add it or drop the row")
    return text


def _given(**values) -> dict:
    return {key: value for key, value in values.items() if value}


def _is_caller(turn: object) -> bool:
    return isinstance(turn, dict) and _role_in(turn) in _CALLERS


def _content(turn: dict, key: str, where: str) -> tuple[str | None, str]:
    """A message's text and thought; of parts, all of them together. The text is None if there is none."""
    value = turn.get(key)
    if not isinstance(value, list):
        if value is not None:
            check_text(value, repr(key), where)
        return value, ""
    texts, thoughts = [], []
    for number, part in enumerate(value, 1):
        place = f"{where}: part {number}"
        if not isinstance(part, dict):
            raise BadRow(
                "no_text", where, f"{key!r} is a list; expected a string or a list of parts {{'type': 'text', 'text': …}}"
            )
        kind = part.get("type", "text")
        if kind in _TEXT_PARTS:
            texts.append(text_in(part, "text", place))
        elif kind in _THOUGHTS:
            name = next((name for name in _THOUGHTS if part.get(name) is not None), "text")
            thoughts.append(text_in(part, name, place))
        else:
            what = f"it is {str(kind)[:_SHOWN]!r} and no text"
            raise BadRow("media", place, f"{what}; only text can be learned from: drop the row")
    return "".join(texts), "".join(thoughts)


def _thought(turn: dict, where: str) -> str:
    for key in _THOUGHTS:
        value = turn.get(key)
        if value is not None:
            if isinstance(value, list):
                return _content({"content": value}, "content", where)[0] or ""
            check_text(value, repr(key), where)
            return value
    return ""


def _weight(turn: dict, where: str) -> dict:
    """{"weight": 0} if the turn says that it is not to be learned from."""
    for key in _WEIGHTS:
        value = turn.get(key)
        if value is None or value is True or value == 1:
            continue
        if value is False or value == 0:
            return {"weight": 0}
        raise BadRow("weight", where, f"{key!r} is neither 0 nor 1 (true nor false); answers count wholly or not at all")
    return {}


def _truncated(turn: dict, where: str) -> dict:
    truncated = turn.get("truncated")
    if truncated is not None and not isinstance(truncated, bool):
        raise BadRow("no_form", where, f"'truncated' is {kind_of(truncated)}; expected true or false")
    return {"truncated": True} if truncated else {}


def _calls(turn: dict, where: str) -> list[dict]:
    """A message's tool calls in the shape that templates expect; empty if it has none."""
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if isinstance(calls, str):
        calls = object_or_text(calls)
    if not isinstance(calls, list):
        raise BadRow("call", where, f"'tool_calls' is {kind_of(calls)}; expected a list")
    return [_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, 1)]


def _calls_in_text(value: object, where: str) -> list[dict]:
    """The calls of a ShareGPT turn: an object or a list of them, as JSON text or as they are."""
    value = object_or_text(value) if isinstance(value, str) else value
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise BadRow("call", where, "the list of calls is empty; add a call or drop the row")
    return [_call(call, f"{where}: call {number}") for number, call in enumerate(calls, 1)]


def _call(call: object, place: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise BadRow("call", place, f"it is {kind_of(function)}; expected an object with 'name' and 'arguments'")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadRow("call", place, "'name' is missing; add it or drop the row")
    check_text(name, "'name'", place)
    arguments = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
    if isinstance(arguments, str):
        check_text(arguments, "'arguments'", place)
        value = object_or_text(arguments)
        arguments = value if isinstance(value, dict) else arguments  # a model may have written what is no object
    elif not isinstance(arguments, dict):
        raise BadRow("call", place, f"'arguments' is {kind_of(arguments)}; expected an object or JSON text")
    shaped = {"type": "function", "function": {"name": name, "arguments": arguments}}
    identity = call.get("id")
    return shaped if identity is None else shaped | {"id": text_in(call, "id", place)}


def _number_calls(messages: Sequence[Message]) -> None:
    """Gives ShareGPT's calls, which have no ids, and the results that follow them one each: some templates insist on them."""
    count = 0
    for index, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        results = []
        for following in messages[index + 1 :]:
            if following["role"] != "tool":
                break
            results.append(following)
        if not calls or any("id" in call for call in calls) or any("tool_call_id" in result for result in results):
            continue
        for call in calls:
            count += 1
            call["id"] = f"call{count:05d}"
        for call, result in zip(calls, results):
            result["tool_call_id"] = call["id"]
