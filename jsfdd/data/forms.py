"""The forms that chat rows are published in, and the conversation that each stands for.

    {"messages": [{"role": "user", "content": "…"}, …]}                OpenAI; also "conversation" (LMSYS, WildChat)
    {"conversations": [{"from": "human", "value": "…"}, …]}            ShareGPT (or with OpenAI's role and content)
    {"instruction": "…", "input": "…" (optional), "output": "…"}       Alpaca; also "history": [["…", "…"], …]
    {"prompt": "…", "response": "…"}                                   plain pairs; each a text or a list of messages
    {"text": "…"}                                                      rendered by the target's own chat template
    {"input_ids": [0, …], "assistant_masks": [0, 1, …]}                tokenized; also "loss_mask", or "labels" with −100

A question is "instruction", "question", "query" or "prompt", or an "input" alone; "input" and "context" beside it are added
to it. Its answer is "output", "response", "completion" or "answer". A row has exactly one list of messages or one question;
"prompt" and "text" are looked at where it has nothing else, because datasets of messages often repeat themselves there.

Beside any form, "system" or "system_prompt" becomes the first message, unless the row has a system message already; "tools"
or "functions" are definitions of tools, as a list or JSON text. Lists of messages may also be JSON text, or one object of
lists, {"role": […], "content": […]}. Images and the like make a row unreadable. Other keys are not read; `unread` names them.

A row to be answered by the target needs a question only; it may be {"turns": ["…", …]}, which `--prompts` takes as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jsfdd.data.messages import (
    Message,
    check_no_media,
    check_text,
    kind_of,
    messages_from,
    object_or_text,
    text_in,
    unread_keys,
)
from jsfdd.data.skipped import BadRow

_LISTS = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "question", "query")
_ANSWERS = ("output", "response", "completion", "answer")
_MORE = ("input", "context")  # beside a question
_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_MASKS = ("assistant_masks", "assistant_mask", "loss_mask", "labels")
_MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios")
_NOT_LEARNED = -100  # in labels
COLUMNS = (
    *_LISTS, *_QUESTIONS, "prompt", *_ANSWERS, *_MORE, "history", "text", "input_ids", *_MASKS, *_SYSTEMS, *_TOOLS, "turns",
    *_MEDIA,
)  # fmt: skip
_NAMED = {*COLUMNS, "id", "source", "answered_by"}  # the last is what `jsfdd respond` writes


class Conversation(NamedTuple):
    """What a chat row stands for. One of messages, text and tokens is given.

    Attributes:
      messages: the turns in order.
      tools: definitions of tools, {"type": "function", "function": {…}} each.
      text: a conversation that was rendered already.
      tokens, mask: one that was tokenized already: ids, and whether each is the assistant's.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[dict, ...] = ()
    text: str = ""
    tokens: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()


def conversation_of(row: dict, place: str, answered: bool = True) -> Conversation:
    """The conversation of a chat row in any of the forms.

    Args:
      row: nulls count as missing keys.
      place: "file:line", for errors.
      answered: whether it needs an answer of the assistant's.

    Raises BadRow, which names place, fault and remedy.
    """
    row = {key: value for key, value in row.items() if value is not None}
    check_no_media(row, place)
    lists = [key for key in _LISTS if key in row]
    if len(lists) > 1:
        raise BadRow("no_form", place, f"a chat row has exactly one list of messages; found {' and '.join(map(repr, lists))}")
    tools = _tools(row, place)
    if lists:
        messages = _turns(row[lists[0]], lists[0], place)
    elif question := _question_key(row, place, answered):
        messages = _pair(row, question, place)
    elif "turns" in row and not answered:
        messages = _user_turns(row["turns"], place)
    elif "input_ids" in row:
        return _tokenized(row, place)
    elif "text" in row:
        return Conversation(text=text_in(row, "text", place), tools=tools)
    else:
        found = ", ".join(map(repr, row)) or "nothing"
        raise BadRow("no_form", place, f"neither messages nor a question with its answer; found {found}")
    messages = _with_system(row, messages, place)
    if answered and all(message["role"] != "assistant" for message in messages):
        raise BadRow("no_answer", place, "no assistant turn, so nothing to learn from; add an answer or drop the row")
    return Conversation(messages, tools)


def unread(row: dict) -> set[str]:
    """The keys of a row, and of its messages as "messages[].KEY", that have values and are not read."""
    keys = {key for key, value in row.items() if value is not None and key not in _NAMED}
    for key in _LISTS:
        if isinstance(row.get(key), list):
            keys |= {f"{key}[].{name}" for name in unread_keys(row[key])}
    return keys


def _question_key(row: dict, place: str, answered: bool) -> str | None:
    asked = [key for key in _QUESTIONS if key in row]
    if len(asked) > 1:
        raise BadRow("no_form", place, f"a chat row has exactly one question; found {' and '.join(map(repr, asked))}")
    if asked:
        return asked[0]
    if "prompt" in row:
        return "prompt"
    return "input" if "input" in row and (not answered or any(key in row for key in _ANSWERS)) else None


def _pair(row: dict, question: str, place: str) -> tuple[Message, ...]:
    answers = [key for key in _ANSWERS if key in row]
    if len(answers) > 1:
        raise BadRow("no_form", place, f"beside {question!r} a row has one answer; found {' and '.join(map(repr, answers))}")
    more = [text_in(row, key, place) for key in _MORE if key in row and key != question]
    asked = _side(row, question, "user", place)
    if any(more):
        asked[-1]["content"] = "\n\n".join(filter(None, [asked[-1]["content"], *more]))
    answer = _side(row, answers[0], "assistant", place) if answers else []
    return (*_history(row, place), *asked, *answer)


def _side(row: dict, key: str, role: str, place: str) -> list[Message]:
    """One side of a plain pair: a text is one message of `role`."""
    if isinstance(row[key], list):
        return list(messages_from(row[key], False, place))
    return [Message(role=role, content=text_in(row, key, place))]


def _history(row: dict, place: str) -> list[Message]:
    """Alpaca's earlier turns: [question, answer] pairs."""
    history = row.get("history", [])
    history = object_or_text(history) if isinstance(history, str) else history
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow("no_form", place, "'history' is no list of [question, answer] pairs")
    messages = []
    for number, (question, answer) in enumerate(history, 1):
        check_text(question, f"question {number} of 'history'", place)
        check_text(answer, f"answer {number} of 'history'", place)
        messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return messages


def _turns(value: object, key: str, place: str) -> tuple[Message, ...]:
    value = object_or_text(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        value = _transposed(value, key, place)
    if not isinstance(value, list):
        raise BadRow("no_form", place, f"{key!r} is {kind_of(value)}; expected a list")
    return messages_from(value, key != "messages", place)


def _transposed(columns: dict, key: str, place: str) -> list[dict]:
    """An object of lists, as Parquet holds sequences of objects, as a list of objects."""
    lengths = {len(values) if isinstance(values, list) else -1 for values in columns.values() if values is not None}
    if len(lengths) != 1 or -1 in lengths:
        raise BadRow("no_form", place, f"{key!r} is an object; expected a list, or an object of lists of one length")
    given = {name: values for name, values in columns.items() if values is not None}
    return [dict(zip(given, values)) for values in zip(*given.values())]


def _user_turns(turns: object, place: str) -> tuple[Message, ...]:
    """Questions alone, an empty answer between them: each is asked when the one before is answered."""
    turns = object_or_text(turns) if isinstance(turns, str) else turns
    if not isinstance(turns, list):
        raise BadRow("no_form", place, f"'turns' is {kind_of(turns)}; expected a list")
    if not turns:
        raise BadRow("empty", place, "'turns' is empty; give at least one user turn or drop the row")
    messages = []
    for number, turn in enumerate(turns, 1):
        check_text(turn, f"turn {number}", place)
        if not turn.strip():
            raise BadRow("no_text", place, f"turn {number} of 'turns' is empty; write it or drop the row")
        messages += [Message(role="user", content=turn), Message(role="assistant", content="")]
    return tuple(messages[:-1])


def _with_system(row: dict, messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    texts = {text_in(row, key, place) for key in _SYSTEMS if key in row} - {""}
    if len(texts) > 1:
        raise BadRow("no_form", place, "'system' and 'system_prompt' differ; leave one of them out")
    if not texts or any(message["role"] == "system" for message in messages):
        return messages
    return (Message(role="system", content=texts.pop()), *messages)


def _tools(row: dict, place: str) -> tuple[dict, ...]:
    keys = [key for key in _TOOLS if row.get(key) not in (None, "", [], {}, "[]")]
    if len(keys) > 1:
        raise BadRow("tools", place, "both 'tools' and 'functions' are given; leave one of them out")
    if not keys:
        return ()
    value = object_or_text(row[keys[0]]) if isinstance(row[keys[0]], str) else row[keys[0]]
    tools = value if isinstance(value, list) else [value]
    tools = [object_or_text(tool) if isinstance(tool, str) else tool for tool in tools]
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("tools", place, f"tool {number} of {keys[0]!r} is no definition with a name")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def read_tools(path: Path) -> tuple[dict, ...]:
    """The definitions of tools in a JSON file: a list of them, or one.

    Raises FileNotFoundError if there is none, and ValueError if it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a JSON file with definitions of tools")
    tools = _tools({"tools": path.read_text(encoding="utf-8")}, str(path))
    if not tools:
        raise ValueError(f"{path}: no definition of a tool in it; give a JSON list of them")
    return tools


def _tokenized(row: dict, place: str) -> Conversation:
    masks = [key for key in _MASKS if key in row]
    if not masks:
        raise BadRow("no_form", place, f"'input_ids' without a mask of the assistant's tokens; add one of {', '.join(_MASKS)}")
    ids, mask = row["input_ids"], row[masks[0]]
    if isinstance(ids, str) and isinstance(mask, str):
        ids, mask = object_or_text(ids), object_or_text(mask)
    for key, values in (("input_ids", ids), (masks[0], mask)):
        if not isinstance(values, list) or not all(type(value) in (int, bool) for value in values):
            raise BadRow("no_form", place, f"{key!r} is no list of whole numbers")
    if len(ids) != len(mask) or not ids:
        raise BadRow("no_form", place, f"{len(ids)} 'input_ids' and {len(mask)} {masks[0]!r}; expected one each")
    if min(ids) < 0 or max(ids) >= 1 << 31:
        raise BadRow("no_form", place, "'input_ids' holds a number that is no token id")
    learned = (value != _NOT_LEARNED for value in mask) if masks[0] == "labels" else (bool(value) for value in mask)
    return Conversation(tokens=tuple(ids), mask=tuple(learned))
