"""Each published form of a chat row, as the messages it stands for."""

import json

import pytest

from jsfdd.data.forms import Conversation, conversation_of
from jsfdd.data.messages import _message, _plain, text_of_calls

BARE = '{"name": "weather", "arguments": {"city": "Rome"}}'
ROME = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
SHAPED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text} | more


def part(text):
    return {"type": "text", "text": text}


def turn(speaker, text):
    return {"from": speaker, "value": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"messages": [user("Q"), answer("A")]}, [user("Q"), answer("A")]),
        ({"messages": [{"role": "developer", "content": "S"}, answer("A")]}, [system("S"), answer("A")]),
        ({"messages": [user([part("Q"), part("?")]), answer("A")]}, [user("Q?"), answer("A")]),
        ({"prompt": "Q", "prompt_id": "x", "messages": [user("Q"), answer("A")]}, [user("Q"), answer("A")]),
        ({"messages": [answer(None, tool_calls=[CALL])]}, [answer("", tool_calls=[SHAPED])]),
        ({"messages": [answer("Look:", tool_calls=[CALL])]}, [answer("Look:", tool_calls=[SHAPED])]),
        ({"messages": [answer("A", tool_calls=None)]}, [answer("A")]),
        ({"messages": [answer("A", truncated=True)]}, [answer("A", truncated=True)]),
        ({"messages": [answer("A", truncated=False), user("Q") | {"truncated": "?"}]}, [answer("A"), user("Q")]),
        (
            {"messages": [answer(None, function_call={"name": "f", "arguments": "not {JSON"})]},
            [answer("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "not {JSON"}}])],
        ),
        (
            {"messages": [answer("A"), {"role": "tool", "content": "9", "tool_call_id": "c1", "name": "f"}]},
            [answer("A"), {"role": "tool", "content": "9", "tool_call_id": "c1", "name": "f"}],
        ),
        ({"messages": [{"role": "function", "content": "9"}, answer("A")]}, [{"role": "tool", "content": "9"}, answer("A")]),
        (
            {"conversations": [turn("human", "Q"), turn("gpt", "Hm."), turn("function_call", BARE), turn("observation", "9")]},
            [user("Q"), answer("Hm.", tool_calls=[ROME]), {"role": "tool", "content": "9", "tool_call_id": "call00001"}],
        ),
        (
            {"conversations": [turn("function-call", f"[{BARE}, {BARE}]"), turn("observation", "9"), turn("tool", "8")]},
            [
                answer("", tool_calls=[ROME, ROME | {"id": "call00002"}]),
                {"role": "tool", "content": "9", "tool_call_id": "call00001"},
                {"role": "tool", "content": "8", "tool_call_id": "call00002"},
            ],
        ),
        ({"conversations": [user("Q"), answer("A")]}, [user("Q"), answer("A")]),
        (
            {"system": "S", "conversations": [turn("human", "Q"), turn("gpt", "A")]},
            [system("S"), user("Q"), answer("A")],
        ),
        ({"system": "", "instruction": "Q", "output": "A"}, [user("Q"), answer("A")]),
        ({"instruction": "Q", "input": "x", "output": "A"}, [user("Q\n\nx"), answer("A")]),
        ({"prompt": "Q", "response": "A"}, [user("Q"), answer("A")]),
        ({"prompt": "Q", "completion": "A", "system": "S"}, [system("S"), user("Q"), answer("A")]),
        ({"prompt": [user("Q"), answer("A"), user("R")], "completion": [answer("B")]},
         [user("Q"), answer("A"), user("R"), answer("B")]),
        ({"instruction": "Q", "history": [["q", "a"], ["r", "b"]], "output": "A"},
         [user("q"), answer("a"), user("r"), answer("b"), user("Q"), answer("A")]),
        ({"instruction": "Q", "context": "x", "response": "A"}, [user("Q\n\nx"), answer("A")]),
        ({"system_prompt": "S", "question": "Q", "response": "A"}, [system("S"), user("Q"), answer("A")]),
        ({"query": "Q", "response": "A"}, [user("Q"), answer("A")]),
        ({"question": "Q", "answer": "A"}, [user("Q"), answer("A")]),
        ({"input": "Q", "output": "A"}, [user("Q"), answer("A")]),
        ({"instruction": "Q", "output": "A", "text": "Q A", "prompt": "whole"}, [user("Q"), answer("A")]),
        ({"conversation": [user("Q"), answer("A")], "conversation_id": "x"}, [user("Q"), answer("A")]),
        ({"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}}, [user("Q"), answer("A")]),
        ({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"], "name": None}}, [user("Q"), answer("A")]),
        ({"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'}, [user("Q"), answer("A")]),
        ({"messages": [user([{"type": "input_text", "text": "Q"}]),
                       answer([{"type": "thinking", "thinking": "t"}, {"type": "output_text", "text": "A"}])]},
         [user("Q"), answer("A", reasoning_content="t")]),
        ({"messages": [answer("A", reasoning_content="t")]}, [answer("A", reasoning_content="t")]),
        ({"messages": [answer("A", reasoning="t")]}, [answer("A", reasoning_content="t")]),
        ({"messages": [answer("A", thinking="t")]}, [answer("A", reasoning_content="t")]),
        ({"messages": [answer(None, reasoning_content="t", tool_calls=[CALL])]},
         [answer("", reasoning_content="t", tool_calls=[SHAPED])]),
        ({"messages": [answer("A", weight=0), answer("B", weight=1), answer("C", train=False), answer("D", train=True)]},
         [answer("A", weight=0), answer("B"), answer("C", weight=0), answer("D")]),
        ({"messages": [user("Q") | {"weight": 0.3}, answer("A")]}, [user("Q"), answer("A")]),
        ({"conversations": [turn("human", "Q"), turn("gpt", "A") | {"weight": 0}]}, [user("Q"), answer("A", weight=0)]),
        ({"messages": [answer("A", loss=False), answer("B", trainable=True), answer("C", loss_mask=0), answer("D", loss=1.0)]},
         [answer("A", weight=0), answer("B"), answer("C", weight=0), answer("D")]),
        ({"messages": [turn("Human", "Q"), turn("GPT", "A")]}, [user("Q"), answer("A")]),
        ({"conversations": [{"role": "User", "value": "Q"}, {"from": "model", "content": "A"}]}, [user("Q"), answer("A")]),
        ({"messages": [turn("human", "Q"), turn("function_call", BARE), turn("observation", "9")]},
         [user("Q"), answer("", tool_calls=[ROME]), {"role": "tool", "content": "9", "tool_call_id": "call00001"}]),
        ({"messages": [user("Q") | {"name": "Ann"}, answer("A")]}, [user("Q") | {"name": "Ann"}, answer("A")]),
        ({"query": "Q", "response": "A", "history": [user("q"), answer("a")]},
         [user("q"), answer("a"), user("Q"), answer("A")]),
        ({"instruction": "Q", "output": "A", "history": ""}, [user("Q"), answer("A")]),
        ({"instruction": "Q", "output": "A", "history": '[["q", "a"]]'}, [user("q"), answer("a"), user("Q"), answer("A")]),
    ],
)  # fmt: skip
def test_a_row_stands_for_these_messages(row, messages):
    assert list(conversation_of(row, "f:1").messages) == messages


TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"default": None}}}}


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [{"type": "function", "function": TOOL}]}, {"tools": [TOOL]}, {"functions": [TOOL]},
        {"tools": json.dumps([TOOL])}, {"tools": [json.dumps(TOOL)]}, {"tools": TOOL}, {"tools": [TOOL], "functions": []},
        {"tools": [{"type": "function", **TOOL}]},
    ],
)  # fmt: skip
def test_definitions_of_tools_in_every_spelling(given):
    found = conversation_of({"messages": [user("Q"), answer("A")]} | given, "f:1")
    assert found.tools == ({"type": "function", "function": TOOL},)
    assert conversation_of({"messages": [user("Q"), answer("A")], "tools": "", "functions": "[]"}, "f:1").tools == ()


def test_rows_that_were_rendered_or_tokenized():
    assert conversation_of({"text": "<s>Q</s>A"}, "f:1") == Conversation(text="<s>Q</s>A")
    tokenized = Conversation(tokens=(5, 6, 7), mask=(False, True, True))
    assert conversation_of({"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1]}, "f:1") == tokenized
    assert conversation_of({"input_ids": [5, 6, 7], "loss_mask": [False, True, True]}, "f:1") == tokenized
    assert conversation_of({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "f:1") == tokenized
    assert conversation_of({"input_ids": [5, 6, 7], "loss_mask": [0.0, 1.0, 1.0]}, "f:1") == tokenized
    padded = {"input_ids": [0, 5, 6, 7, 0, 0], "attention_mask": [0, 1, 1, 1, 0, 0], "loss_mask": [0, 0, 1, 1, 0, 0]}
    assert conversation_of(padded, "f:1") == tokenized
    assert conversation_of({key: json.dumps(value) for key, value in padded.items()}, "f:1") == tokenized


def test_a_row_to_be_answered_needs_a_question_only():
    for row in ({"prompt": "Q"}, {"question": "Q"}, {"messages": [user("Q")]}, {"instruction": "Q"}, {"turns": ["Q"]}):
        assert conversation_of(row, "f:1", answered=False).messages == (user("Q"),)
    assert conversation_of({"turns": ["Q", "R"]}, "f:1", answered=False).messages == (user("Q"), answer(""), user("R"))


def test_a_system_message_in_the_row_comes_before_its_system_column():
    own = system("mine")
    found = conversation_of({"system": "other", "messages": [own, answer("A")]}, "f:1")
    assert found.messages == (own, answer("A"))


def test_calls_as_text():
    two = [SHAPED, {"type": "function", "function": {"name": "f", "arguments": "raw"}}]
    assert text_of_calls(two) == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": "raw"}\n</tool_call>'
    )


@pytest.mark.parametrize("turn", [
    {"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}, {"content": "S", "role": "system"},
])  # fmt: skip
def test_a_plain_turn_is_read_as_any_other(turn):
    assert _plain(turn) == _message(turn, "chats.jsonl:1") == {"role": turn["role"], "content": turn["content"]}


@pytest.mark.parametrize("turn", [
    {"role": "User", "content": "Q"}, {"role": "user", "content": None}, {"role": "user", "content": "é"},
    {"role": "user", "content": ["Q"]}, {"role": "user", "content": "Q", "name": "n"}, {"from": "user", "value": "Q"}, {}, "Q",
    {"role": ["user"], "content": "Q"}, {"role": "function_call", "content": "{}"},
])  # fmt: skip
def test_other_turns_are_not_plain(turn):
    assert _plain(turn) is None
