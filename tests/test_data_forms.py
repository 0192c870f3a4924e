"""Each published form of a chat row, as the messages it stands for."""

import pytest

from jsfdd.data.forms import messages_of, text_of_calls

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
            {"conversations": [turn("human", "Q"), turn("function_call", "{}"), turn("observation", "9")]},
            [user("Q"), answer("{}"), {"role": "tool", "content": "9"}],
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
    ],
)  # fmt: skip
def test_a_row_stands_for_these_messages(row, messages):
    assert list(messages_of(row, "f:1")) == messages


def test_a_system_message_in_the_row_comes_before_its_system_column():
    own = system("mine")
    assert messages_of({"system": "other", "messages": [own, answer("A")]}, "f:1") == (own, answer("A"))


def test_calls_as_text():
    two = [SHAPED, {"type": "function", "function": {"name": "f", "arguments": "raw"}}]
    assert text_of_calls(two) == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": "raw"}\n</tool_call>'
    )
