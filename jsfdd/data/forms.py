"""The published forms of chat rows, and how each becomes a conversation.

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
Beside "input_ids", "attention_mask" says what is padding.

A row to be answered by the target needs a question only; it may be {"turns": ["…", …]}, which `--prompts` takes as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jsfdd.data.messages import (
    MEDIA,
    Message,
    check_no_media,
    check_text,
    kind_of,
    messages_from,
    object_or_text,
    text_in,
    unread_keys,
)
from jsfdd.data.rows import label_of
from jsfdd.data.skipped import BadRow

_LISTS = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "question", "query")
_ANSWERS = ("output", "response", "completion", "answer")
_MORE = ("input", "context")  # beside a question
_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_MASKS = ("assistant_masks", "assistant_mask", "loss_mask", "labels")
_NOT_LEARNED = -100  # in labels
COLUMNS = {
    *_LISTS, *_QUESTIONS, "prompt", *_ANSWERS, *_MORE, "history", "text", "input_ids", "attention_mask", *_MASKS, *_SYSTEMS,
    *_TOOLS, "turns", *MEDIA,
}  # fmt: skip
_LABELS = ("id", "source")


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


def conversation_of(row: object, place: str, answered: bool = True) -> Conversation:
    """The conversation of a chat row in any of the forms.

    Args:
      row: nulls count as missing keys.
      place: "file:line", for errors.
      answered: whether it needs an answer of the assistant's.

    Raises BadRow, which names place, fault and remedy.
    """
    if not isinstance(row, dict):
        raise BadRow("no_form", place, f"found {kind_of(row)}; a row is an object {{…}}")
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


def unread(row: dict, found: Conversation, answered: bool = True) -> set[str]:
    """The keys that say something and are not read: of a row, and of its messages as "messages[].KEY".

    Args:
      row: a chat row, of which `conversation_of` made what was `found`.
      answered: as it was for that.
    """
    used = {"answered_by", *(key for key in _LABELS if label_of(row.get(key)))}  # the first is what `jsfdd respond` writes
    if lists := [key for key in _LISTS if row.get(key) is not None]:
        used |= {*lists, *_TOOLS}
        keys = {f"{lists[0]}[].{name}" for name in unread_keys(_turn_list(row[lists[0]], lists[0], ""))}
    elif found.messages:
        question = _question_key(row, "", answered)
        used |= {question, *_ANSWERS, *_MORE, "history", *_TOOLS} if question else {"turns", *_TOOLS}
        keys = set()
    else:
        used |= {"text"} if found.text else {"input_ids", "attention_mask", _mask_key(row)}
        keys = set()
    systems = [message["content"] for message in found.messages if message["role"] == "system"]
    used |= {key for key in _SYSTEMS if row.get(key) in systems}
    return keys | {key for key, value in row.items() if value not in (None, "", [], {}) and key not in used}


def _question_key(row: dict, place: str, answered: bool) -> str | None:
    questions = [key for key in _QUESTIONS if row.get(key) is not None]
    if len(questions) > 1:
        raise BadRow("no_form", place, f"a chat row has exactly one question; found {' and '.join(map(repr, questions))}")
    if questions:
        return questions[0]
    if row.get("prompt") is not None:
        return "prompt"
    has_answer = any(row.get(key) is not None for key in _ANSWERS)
    return "input" if row.get("input") is not None and (has_answer or not answered) else None


def _pair(row: dict, question: str, place: str) -> tuple[Message, ...]:
    answers = [key for key in _ANSWERS if key in row]
    if len(answers) > 1:
        raise BadRow("no_form", place, f"beside {question!r} a row has one answer; found {' and '.join(map(repr, answers))}")
    extra = [text_in(row, key, place) for key in _MORE if key in row and key != question]
    asked = _side(row, question, "user", place)
    if any(extra):
        asked[-1]["content"] = "\n\n".join(filter(None, [asked[-1]["content"], *extra]))
    answer = _side(row, answers[0], "assistant", place) if answers else []
    return (*_history(row, place), *asked, *answer)


def _side(row: dict, key: str, role: str, place: str) -> list[Message]:
    """One side of a plain pair. A text becomes one message of `role`."""
    if isinstance(row[key], list):
        return list(messages_from(row[key], place))
    return [Message(role=role, content=text_in(row, key, place))]


def _history(row: dict, place: str) -> list[Message]:
    """Alpaca's earlier turns: [question, answer] pairs, or messages."""
    history = row.get("history", [])
    history = object_or_text(history) if isinstance(history, str) and history else history or []
    if isinstance(history, list) and history and all(isinstance(turn, dict) for turn in history):
        return list(messages_from(history, place))
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow("no_form", place, "'history' is no list of [question, answer] pairs")
    messages = []
    for number, (question, answer) in enumerate(history, 1):
        check_text(question, f"question {number} of 'history'", place)
        check_text(answer, f"answer {number} of 'history'", place)
        messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return messages


def _turns(value: object, key: str, place: str) -> tuple[Message, ...]:
    return messages_from(_turn_list(value, key, place), place)


def _turn_list(value: object, key: str, place: str) -> list:
    value = object_or_text(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        value = _transposed(value, key, place)
    if not isinstance(value, list):
        raise BadRow("no_form", place, f"{key!r} is {kind_of(value)}; expected a list")
    return value


def _transposed(columns: dict, key: str, place: str) -> list[dict]:
    """An object of lists, as Parquet holds sequences of objects, as a list of objects."""
    lengths = {len(values) if isinstance(values, list) else -1 for values in columns.values() if values is not None}
    if len(lengths) != 1 or -1 in lengths:
        raise BadRow("no_form", place, f"{key!r} is an object; expected a list, or an object of lists of one length")
    present = {name: values for name, values in columns.items() if values is not None}
    return [dict(zip(present, values)) for values in zip(*present.values())]


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
    return tuple(tool if "function" in tool else _wrapped(tool) for tool in tools)


def _wrapped(function: dict) -> dict:
    """A bare definition, which may have the wrapper's type beside its own keys, as chat templates take it."""
    bare = {key: value for key, value in function.items() if (key, value) != ("type", "function")}
    return {"type": "function", "function": bare}


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


def _mask_key(row: dict) -> str | None:
    return next((key for key in _MASKS if row.get(key) is not None), None)


def _tokenized(row: dict, place: str) -> Conversation:
    key = _mask_key(row)
    if key is None:
        raise BadRow("no_form", place, f"'input_ids' without a mask of the assistant's tokens; add one of {', '.join(_MASKS)}")
    ids, mask = _whole_numbers(row, "input_ids", place), _whole_numbers(row, key, place)
    attended = _whole_numbers(row, "attention_mask", place) if "attention_mask" in row else [1] * len(ids)
    if not len(ids) == len(mask) == len(attended) or not ids:
        raise BadRow("no_form", place, f"{len(ids)} 'input_ids' and {len(mask)} {key!r}; expected one each")
    if min(ids) < 0 or max(ids) >= 1 << 31:
        raise BadRow("no_form", place, "'input_ids' holds a number that is no token id")
    learned = [value != _NOT_LEARNED if key == "labels" else bool(value) for value in mask]
    if key == "labels" and any(label != token for label, token, counts in zip(mask, ids, learned) if counts):
        raise BadRow("no_form", place, "'labels' are neither the 'input_ids' nor −100; were they shifted?")
    begin, end = _attended(attended, place)
    return Conversation(tokens=tuple(ids[begin:end]), mask=tuple(learned[begin:end]))


def _whole_numbers(row: dict, key: str, place: str) -> list[int]:
    values = object_or_text(row[key]) if isinstance(row[key], str) else row[key]
    if not isinstance(values, list) or not all(type(v) in (int, bool) or type(v) is float and v.is_integer() for v in values):
        raise BadRow("no_form", place, f"{key!r} is no list of whole numbers")
    return [int(value) for value in values]


def _attended(attended: list[int], place: str) -> tuple[int, int]:
    """Where the text begins and ends, without padding."""
    if 1 not in attended:
        raise BadRow("empty", place, "'attention_mask' is 1 nowhere; drop the row")
    begin, end = attended.index(1), len(attended) - attended[::-1].index(1)
    if set(attended[begin:end]) != {1}:
        raise BadRow("no_form", place, "'attention_mask' is not 1 over one whole stretch; a row is one conversation")
    return begin, end
