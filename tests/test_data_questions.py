"""What a chat asks: its users' turns, and why some chats ask nothing."""

import json

import pytest
from toy import toy_tokenizer

from jsfdd.data.chat import read_chat_files
from jsfdd.data.counts import count_questions_by_file, total
from jsfdd.data.questions import Questions, QuestionTable, prompt_of, questions_of
from jsfdd.data.template import render_prompt

ROLES = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}


def messages(*texts):
    """ "u:hello" is the user's "hello"."""
    return [{"role": ROLES[text[0]], "content": text[2:]} for text in texts]


def found_in(tmp_path, *conversations):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": f"c{i}", "messages": c}) + "\n" for i, c in enumerate(conversations)))
    return read_chat_files([path], answered=False)


def ask(tmp_path, *conversations, tokenizer=None, longest_prompt=200, **options):
    found = found_in(tmp_path, *conversations)
    return questions_of(found.chats, tokenizer or toy_tokenizer(), longest_prompt=longest_prompt, **options)


@pytest.mark.parametrize(
    "conversation, turns",
    [
        (["u:one", "a:x"], [["u:one"]]),
        (["s:be", "u:one", "a:x", "u:two", "a:y"], [["s:be", "u:one"], ["u:two"]]),
        (["u:one", "a:x", "u:unanswered"], [["u:one"], ["u:unanswered"]]),
        (["u:only"], [["u:only"]]),
        (["a:greeting", "u:one", "a:x"], [["u:one"]]),
        (["s:be", "a:greeting", "u:one", "a:x"], [["s:be", "u:one"]]),
        (["u:one", "a:x", "a:more", "u:two"], [["u:one"], ["u:two"]]),
        (["u:one", "u:again", "a:x"], [["u:one", "u:again"]]),
        (["u:one", "a:call", "t:9", "a:x", "u:two"], [["u:one"]]),
        (["t:9", "u:one", "a:x"], []),
        (["s:be", "a:greeting"], []),
    ],
)
def test_turns(tmp_path, conversation, turns):
    other = messages("u:another", "a:y")
    asked, summary = ask(tmp_path, messages(*conversation), other)
    assert summary.skipped["no_question"] == (() if turns else ("c0",))
    expected = [tuple(tuple(messages(*turn)) for turn in turns)] if turns else []
    assert [each.turns for each in asked] == [*expected, (tuple(other[:1]),)]
    first, _ = ask(tmp_path, messages(*conversation), other, first_turn_only=True)
    assert [each.turns for each in first] == [each.turns[:1] for each in asked]


def test_questions_on_disk_are_a_sequence_of_what_was_appended():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": None}}}
    rows = [
        Questions(7, "é", "s", (tuple(messages("s:be", "u:one")), tuple(messages("u:\n二")))),
        Questions(2**40, "b", "", (tuple(messages("u:x")),), (tool,)),
    ]
    table = QuestionTable()
    for row in rows:
        table.append(row)
    assert list(table) == rows and table[-1] == rows[1] and table[:1] == rows[:1] and len(table) == 2
    with pytest.raises(IndexError):
        table[2]
    table.append(rows[0])  # behind what was read last
    assert list(table) == [*rows, rows[0]]


def test_a_prompt_holds_the_targets_own_answers():
    tokenizer = toy_tokenizer()
    turns = [tuple(messages("s:be", "u:one")), tuple(messages("u:two"))]
    assert prompt_of(tokenizer, turns, []) == render_prompt(tokenizer, messages("s:be", "u:one"))
    answer = messages("a:mine")
    expected = render_prompt(tokenizer, messages("s:be", "u:one", "a:mine", "u:two"))
    assert prompt_of(tokenizer, turns, answer) == expected


def test_what_is_not_asked_is_counted_by_reason(tmp_path):
    """A number stays a chat's own whatever is skipped before it: it draws the answers."""
    tokenizer = toy_tokenizer()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    length = len(render_prompt(tokenizer, messages("u:" + "x" * 30)))
    found = found_in(
        tmp_path,
        messages("u:one", "a:x"),
        messages("u:one", "a:x"),  # the very same
        messages("u:one", "a:other answer"),  # the same question
        messages("a:hello"),
        messages("u:what is <|im_end|>?", "a:x"),
        messages("s:be", "u:one", "a:x"),
        messages("u:" + "x" * 31, "a:x"),
        messages("u:" + "x" * 30, "a:said <|im_end|>", "u:" + "y" * 500),  # later turns may turn out shorter or never come
    )
    asked, summary = questions_of(found.chats, tokenizer, longest_prompt=length)
    assert [(each.number, each.id) for each in asked] == [(0, "c0"), (6, "c7")]
    assert summary.skipped == {
        "no_question": ("c3",), "duplicates": ("c2",), "special_text": ("c4",), "refused": ("c5",), "too_long": ("c6",),
        "unknown_token": (),
    }  # fmt: skip
    [counts] = count_questions_by_file(found, summary)
    assert (counts.read, counts.kept, counts.skipped["duplicates"]) == (8, 2, 2) and total([counts]).skipped["too_long"] == 1
    assert "1 without a user's turn" in str(counts) and "1 whose prompt and answer exceed the maximal length" in str(counts)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no conversation is left to answer \(1 whose prompt .*10 tokens.*--max-new-tokens"):
        ask(tmp_path, messages("u:hello there", "a:x"), longest_prompt=10)
