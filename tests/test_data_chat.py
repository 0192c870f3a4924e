"""Reading chat and prompt files: duplicates, ids, and every way a file or a row can be wrong."""

import gzip
import json

import pyarrow as pa
import pytest

from jsfdd.data import formats
from jsfdd.data.chat import read_chat_files, read_chats, read_prompts
from jsfdd.data.forms import conversation_of, unread
from jsfdd.data.skipped import BadRow, check_skipped

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 👋"}]
ROW = {"id": "a", "source": "s", "messages": TURNS}


def write(path, *rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = json.dumps(list(rows), indent=1).encode() if ".json" in path.suffixes else lines.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_lines_are_counted_with_blank_ones_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "c.jsonl"
    row, other = json.dumps({"messages": TURNS}), json.dumps({"messages": TURNS * 2})
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\n\n  \n{other}".encode())
    chats = read_chats([path])
    assert [c.id for c in chats] == ["c-1", "c-4"]
    assert chats[1].place == f"{path}:4"
    path.with_suffix(".json").write_bytes(b"\xef\xbb\xbf" + f"[{row}]".encode())
    assert read_chats([path.with_suffix(".json")])[0].id == "c-1"


def test_entries_of_a_list_are_placed_by_line_and_number(tmp_path):
    path = tmp_path / "c.json"
    row = json.dumps(ROW)
    path.write_text(f"\n[\n{row},\n\n{{}}]")
    with pytest.raises(ValueError, match=r"c\.json:5: entry 2: .*neither messages nor a question"):
        read_chats([path])


def test_an_id_of_two_conversations(tmp_path):
    first = write(tmp_path / "one.jsonl", ROW)
    second = write(tmp_path / "two.jsonl", {"messages": TURNS * 2}, ROW | {"messages": TURNS * 3})
    found = read_chat_files([first, second])
    assert [chat.id for chat in found.chats] == ["a", "two-1", "two-2"] and found.renamed == 1
    assert found.notes() == ["1 rows have the id of another and are named after their file and place in it"]
    with pytest.raises(ValueError, match=r"two\.jsonl:2: id 'a' was already used at .*one\.jsonl:1; make ids unique"):
        read_chats([first, second])
    prompts = write(tmp_path / "p.jsonl", {"id": "a", "turns": ["x"]})
    with pytest.raises(ValueError, match=r"p\.jsonl:1: id 'a' was already used at .*p\.jsonl:1"):
        read_prompts([prompts, prompts])


def test_duplicates_are_conversations_of_the_same_messages_in_any_file(tmp_path):
    as_sharegpt = {"id": "other", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello 👋"}]}
    almost = {"messages": [TURNS[0], {"role": "assistant", "content": "Hello 👋 "}]}
    swapped = {"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hello 👋"}]}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    calls = [{"messages": [call]}, {"messages": [{**call, "tool_calls": [{"function": {"name": "g", "arguments": {}}}]}]}]
    first = write(tmp_path / "one.jsonl", ROW, ROW, almost)
    second = write(tmp_path / "two.jsonl", as_sharegpt, swapped, *calls, ROW)
    found = read_chat_files([first, second])
    assert [chat.id for chat in found.chats] == ["a", "one-3", "two-2", "two-3", "two-4"]
    assert found.read == {str(first): 3, str(second): 5}
    assert found.duplicates == {str(first): 1, str(second): 2}
    assert [chat.file for chat in found.chats] == [str(first)] * 2 + [str(second)] * 3


def message(role="user", content="Hi", **extra):
    return {"messages": [{"role": role, "content": content} | extra, TURNS[1]]}


@pytest.mark.parametrize(
    "row, reason, error",
    [
        ({}, "no_form", "neither messages nor a question with its answer; found nothing"),
        ({"chosen": []}, "no_form", "found 'chosen'"),
        (ROW | {"conversations": []}, "no_form", "found 'messages' and 'conversations'"),
        ({"messages": []}, "empty", "the conversation is empty; add"),
        ({"messages": "Hi"}, "no_form", "'messages' is a string; expected a list"),
        ({"messages": {"role": ["user"], "content": []}}, "no_form", "an object of lists of one length"),
        ({"messages": ["Hi"]}, "no_form", "message 1: found a string; expected {'role'"),
        ({"messages": TURNS[:1]}, "no_answer", "no assistant turn, .*; add an answer"),
        ({"messages": [{"content": "Hi"}]}, "no_text", "message 1: 'role' is missing; add it"),
        ({"messages": [{"role": "user"}]}, "no_text", "message 1: 'content' is missing; add it"),
        (message(role="robot"), "unknown_role", "message 1: unknown role 'robot'; use one of system, user, assistant"),
        (message(role="my number is " + "5" * 99), "unknown_role", "unknown role 'my number is 55555555555555555'; use"),
        (message(role=None), "no_text", "message 1: 'role' is missing"),
        (message(role=3), "no_text", "message 1: 'role' is a number; expected a string"),
        (message(content=None), "no_text", "message 1: 'content' is missing"),
        (message("assistant", None), "no_text", "message 1: 'content' is missing"),
        (message(content=["Hi"]), "no_text", "message 1: 'content' is a list; expected a string"),
        (message(content="\ud83d!"), "no_text", "'content' holds half a surrogate pair at character 0; remove it"),
        ({"conversations": [{"from": "bot", "value": ""}]}, "unknown_role", "unknown role 'bot'; use one of system, .*human"),
        (message(content=[{"type": "image_url"}]), "media", "message 1: part 1: it is 'image_url' and no text; only text"),
        (message(content=[{"type": "input_audio"}]), "media", "part 1: it is 'input_audio'"),
        (message(image="a.png"), "media", "message 1: 'image' is given"),
        (ROW | {"images": ["a.png"]}, "media", "'images' is given"),
        (ROW | {"video": {"bytes": "x"}}, "media", "'video' is given"),
        (message(content=[{"type": "text"}]), "no_text", "message 1: part 1: 'text' is missing"),
        (message("assistant", None, tool_calls=[]), "no_text", "'content' is missing"),
        (message("assistant", None, tool_calls="f"), "call", "'tool_calls' is a string; expected a list"),
        (message("assistant", None, tool_calls=["f"]), "call", "message 1: tool call 1: it is a string; expected an object"),
        (message("assistant", None, tool_calls=[{"function": {}}]), "call", "message 1: tool call 1: 'name' is missing"),
        (message("assistant", None, function_call={"name": "f", "arguments": 3}), "call", "'arguments' is a number; expected"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "call", "call 1: 'name' is missing"),
        (
            {"conversations": [{"from": "function_call", "value": "I call f"}]},
            "call",
            "call 1: it is a string; expected an obj",
        ),
        (message("assistant", truncated="yes"), "no_form", "message 1: 'truncated' is a string; expected true or false"),
        (message("assistant", weight=0.5), "weight", "message 1: 'weight' is neither 0 nor 1"),
        (message("assistant", train="no"), "weight", "message 1: 'train' is neither 0 nor 1"),
        (message("assistant", reasoning_content=3), "no_text", "'reasoning_content' is a number; expected a string"),
        (message("tool", tool_call_id=3), "no_text", "'tool_call_id' is a number; expected a string"),
        ({"prompt": "Q"}, "no_answer", "no assistant turn"),
        ({"prompt": "Q", "response": "A", "completion": "A"}, "no_form", "found 'response' and 'completion'"),
        ({"question": "Q", "query": "Q", "answer": "A"}, "no_form", "found 'question' and 'query'"),
        ({"prompt": 3, "response": "A"}, "no_text", "'prompt' is a number; expected a string"),
        ({"prompt": [], "response": "A"}, "empty", "the conversation is empty"),
        (ROW | {"system": 3}, "no_text", "'system' is a number; expected a string"),
        (ROW | {"system": "a", "system_prompt": "b"}, "no_form", "'system' and 'system_prompt' differ"),
        (ROW | {"tools": "none"}, "tools", "tool 1 of 'tools' is no definition with a name"),
        (ROW | {"tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "tools", "both 'tools' and 'functions'"),
        ({"instruction": "Q"}, "no_answer", "no assistant turn"),
        ({"instruction": "Q", "output": None}, "no_answer", "no assistant turn"),
        ({"instruction": "Q", "input": 3, "output": ""}, "no_text", "'input' is a number; expected a string"),
        (
            {"instruction": "Q", "output": "A", "history": [["q"]]},
            "no_form",
            "'history' is no list of .question, answer. pairs",
        ),
        ({"instruction": "Q", "output": "A", "history": [["q", None]]}, "no_text", "answer 1 of 'history' is null"),
        ({"input_ids": [1, 2]}, "no_form", "'input_ids' without a mask"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "no_form", "2 'input_ids' and 1 'loss_mask'; expected one each"),
        ({"input_ids": [1, -2], "loss_mask": [1, 1]}, "no_form", "a number that is no token id"),
        ({"input_ids": [1, 2.5], "loss_mask": [1, 1]}, "no_form", "'input_ids' is no list of whole numbers"),
        ({"input_ids": [1, float("nan")], "loss_mask": [1, 1]}, "no_form", "'input_ids' is no list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "no_form", "'labels' are neither .*; were they shifted"),
        ({"input_ids": [1, 2, 3], "loss_mask": [1] * 3, "attention_mask": [1, 0, 1]}, "no_form", "over one whole stretch"),
        ({"input_ids": [1, 2], "loss_mask": [1, 1], "attention_mask": [0, 0]}, "empty", "'attention_mask' is 1 nowhere"),
        (ROW | {"image_paths": ["a.png"]}, "media", "'image_paths' is given"),
        (message(audio_url="a.wav"), "media", "message 1: 'audio_url' is given"),
        ([], "no_form", "found a list; a row is an object"),
        ("row", "no_form", "found a string; a row is an object"),
        (None, "no_form", "found null; a row is an object"),
    ],
)
def test_bad_rows_are_named_or_skipped_and_counted(tmp_path, row, reason, error):
    path = tmp_path / "bad.jsonl"
    good = [{"messages": TURNS * n} for n in (1, 2)]
    path.write_text("\n".join(json.dumps(value) for value in (good[0], row, good[1], row)))
    with pytest.raises(BadRow, match=rf"bad\.jsonl:2: .*{error}"):
        read_chats([path])
    found = read_chat_files([path])
    assert [chat.place for chat in found.chats] == [f"{path}:1", f"{path}:3"]
    assert found.skipped.counts == {(str(path), reason): 2} and found.read[str(path)] == 4
    assert found.skipped.first[reason].startswith(f"{path}:2: ")


def test_an_id_or_source_that_is_neither_text_nor_number_is_not_read(tmp_path):
    values = ["x", 7, 7.5, 8.0, True, {"a": 1}, "\ud83d", ""]
    rows = [{"id": value, "source": value, "messages": TURNS * n} for n, value in enumerate(values, 1)]
    path = tmp_path / "i.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_chat_files([path])
    assert [chat.id for chat in found.chats] == ["x", "7", "7.5", "8", "i-5", "i-6", "i-7", "i-8"]
    assert [chat.source for chat in found.chats] == ["x", "7", "7.5", "8", "i", "i", "i", "i"]
    assert found.unread == {"id": 3, "source": 3}


def test_more_bad_rows_than_allowed_are_an_error_that_lists_every_reason():
    first = {"empty": "f:2: it is empty", "media": "f:9: an image"}
    check_skipped(100, {"empty": 3, "media": 2}, first, None)
    check_skipped(4, {"empty": 3}, first, None)  # of a handful no share is taken
    check_skipped(4, {"empty": 2}, first, 0.5)
    with pytest.raises(ValueError) as error:
        check_skipped(100, {"empty": 4, "media": 2}, first, None)
    assert "6 of 100 rows cannot be learned from, more than --max-skipped 5%" in str(error.value)
    assert "4 empty conversations; first f:2: it is empty" in str(error.value) and "first f:9: an image" in str(error.value)
    with pytest.raises(ValueError, match="1 of 4 rows"):
        check_skipped(4, {"empty": 1}, first, 0.1)


def test_a_null_is_a_missing_key_in_every_place(tmp_path):
    rows = [
        {"id": None, "source": None, "system_prompt": None, "conversations": [{"from": "human", "value": "Q", "weight": None}]},
        {"system": None, "messages": TURNS, "conversations": None, "tools": None, "images": None},
        {"instruction": "Say", "input": None, "output": "so", "history": None},
    ]
    rows[0]["conversations"].append({"from": "gpt", "role": None, "value": "A", "tool_calls": None, "reasoning_content": None})
    chats = read_chats([write(tmp_path / "n.jsonl", *rows)])
    assert [chat.id for chat in chats] == ["n-1", "n-2", "n-3"]
    assert [len(chat.messages) for chat in chats] == [2, 2, 2]
    # What a call was given stays as it is.
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"city": None}}}]}
    [chat] = read_chats([write(tmp_path / "c.jsonl", {"messages": [call]})])
    assert chat.messages[0]["tool_calls"][0]["function"]["arguments"] == {"city": None}


def test_keys_that_are_not_read_are_counted(tmp_path):
    rows = [
        {"messages": [TURNS[0] | {"toxic": False}, TURNS[1]], "score": 3, "lang": None},
        {"messages": TURNS * 2, "score": 4, "rejected": "no"},
    ]
    found = read_chat_files([write(tmp_path / "u.jsonl", *rows)])
    assert found.unread == {"score": 2, "rejected": 1, "messages[].toxic": 1}
    assert found.unread_words() == "not read: 2 rows have 'score', 1 rows have 'messages[].toxic', 1 rows have 'rejected'"
    assert read_chat_files([write(tmp_path / "v.jsonl", {"messages": TURNS})]).unread_words() == ""


USER, ANSWER = TURNS


@pytest.mark.parametrize(
    "row, keys",
    [
        ({"messages": TURNS, "output": "x", "text": "y", "history": [["a", "b"]]}, {"output", "text", "history"}),
        ({"system": "other", "messages": [{"role": "system", "content": "S"}, *TURNS]}, {"system"}),
        ({"system": "S", "messages": [{"role": "system", "content": "S"}, *TURNS]}, set()),
        ({"system": "S", "messages": TURNS, "tools": [{"name": "f"}]}, set()),
        ({"instruction": "Q", "output": "A", "input": "", "prompt": "whole", "weight": 0}, {"prompt", "weight"}),
        ({"text": "<s>", "tools": [{"name": "f"}], "system": "S"}, {"tools", "system"}),
        ({"input_ids": [1, 2], "loss_mask": [1, 1], "labels": [1, 2], "position_ids": [0, 1]}, {"labels", "position_ids"}),
        ({"messages": [USER | {"reasoning": "r", "tool_calls": []}, ANSWER]}, {"messages[].reasoning"}),
        ({"messages": [USER, ANSWER | {"tool_call_id": "c", "refusal": None}]}, {"messages[].tool_call_id"}),
        ({"messages": [USER, ANSWER | {"value": "other", "from": "assistant"}]}, {"messages[].value"}),
        ({"messages": json.dumps([USER, ANSWER | {"rating": 1}])}, {"messages[].rating"}),
        ({"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"], "rating": [1, 2]}}, {"conversations[].rating"}),
        ({"messages": [USER | {"weight": 1}, ANSWER | {"weight": 1, "truncated": False, "thinking": None}]}, set()),
    ],
)
def test_a_key_counts_as_read_where_it_is(row, keys):
    found = conversation_of(row, "f:1")
    assert unread(row, found) == keys


GOOD = json.dumps(ROW).encode()
ZSTD = pa.compress(GOOD, "zstd", asbytes=True)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    "name, data, error",
    [
        ("f.jsonl", b"", r"f.jsonl: the file holds no rows; remove"),
        ("f.jsonl", b"\n \n", r"f.jsonl: the file holds no rows"),
        ("f.json", b"[ ]", r"f.json: the file holds no rows"),
        ("f.jsonl", GOOD + b"\n" + GOOD[:-3], r"f.jsonl:2: malformed JSON .*; one complete JSON object a line"),
        ("f.jsonl", b"[" * 100_000, r"f.jsonl:1: malformed JSON"),
        ("f.jsonl", b'{"id": ' + b"1" * 10_000 + b"}", r"f.jsonl:1: malformed JSON .*limit"),
        ("f.jsonl", GOOD + b"\n{\xff}", r"f.jsonl:2: invalid UTF-8 at byte 1 .*; save the file as UTF-8"),
        ("f.jsonl", gzip.compress(GOOD), r"f.jsonl:1: invalid UTF-8 .*; this is gz data: end the file's name in .gz"),
        ("f.jsonl.gz", GOOD, r"f.jsonl.gz:1: cannot be unpacked as gzip .*; copy the file again, or drop .gz"),
        ("f.jsonl.gz", gzip.compress(GOOD)[:-9], r"f.jsonl.gz:\d: cannot be unpacked as gzip"),
        ("f.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), r"f.jsonl.gz:\d: cannot be unpacked as gzip"),
        ("f.jsonl", ZSTD, r"f.jsonl:1: invalid UTF-8 .*; this is zst data: end the file's name in .zst"),
        ("f.jsonl.zst", GOOD, r"f.jsonl.zst:1: cannot be unpacked as zstd .*; copy the file again, or drop .zst"),
        ("f.jsonl.zst", ZSTD[:-3], r"f.jsonl.zst:1: cannot be unpacked as zstd \(Truncated"),
        ("f.jsonl.zst", b"", r"f.jsonl.zst: the file holds no rows"),
        ("f.parquet", GOOD, r"f.parquet: cannot be read as Parquet .*; copy or write the file again"),
        ("f.parquet.gz", GOOD, r"f.parquet.gz: unknown file ending"),
        ("f.json", b'"row"', r"f.json:1: a .json file holds one list .* found '\"'"),
        ("f.json", b"", r"f.json:1: a .json file holds one list .* an empty file"),
        ("f.json", GOOD + b"\n" + GOOD[:-3], r"f.json:2: malformed JSON"),
        ("f.json", b"[" + GOOD, r"f.json:1: expected ',' or '\]' after entry 1; is the file cut off"),
        ("f.json", b"[\n" + GOOD + b",]", r"f.json:2: entry 2: malformed JSON"),
        ("f.json", b"[,", r"f.json:1: entry 1: malformed JSON"),
        ("f.json", b"[\n", r"f.json:2: entry 1: malformed JSON"),
        ("f.json", b"[\n" + GOOD + b"\n]\n]", r"f.json:4: text after the closing"),
        ("f.txt", GOOD, r"f.txt: unknown file ending; expected .jsonl, .ndjson, .json or .csv"),
        ("f.arrow", GOOD, r"f.arrow: cannot be read as Arrow"),
        ("f.csv", b"prompt,response\na", r"f.csv: row 1: 1 cells under 2 names"),
        ("f.csv", b'prompt,response\n"a', r"f.csv:2: malformed CSV|f.csv: row 1: 1 cells"),
        ("f.csv", b"", r"f.csv: the file holds no rows"),
        ("f.csv", b"prompt,prompt,response\na,b,c", r"f.csv: two columns have one name"),
        ("f.jsonl", "é".encode("utf-16"), r"f.jsonl:1: invalid UTF-8 .*; this is UTF-16"),
        (".json", GOOD, r".json: unknown file ending"),
        *((f"f.{ending}", POINTER, "a Git LFS pointer") for ending in ("jsonl", "json", "csv", "jsonl.gz", "parquet", "arrow")),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, error):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=error):
        read_chats([tmp_path / name])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file; check"):
        read_chats([tmp_path / "gone.jsonl"])


def test_what_unfolds_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_ROW_BYTES", 1 << 20)
    for ending in ("jsonl.gz", "json.gz", "jsonl.zst", "json.zst"):
        path = tmp_path / f"bomb.{ending}"
        data = b" " * (1 << 24)
        path.write_bytes(gzip.compress(data) if ending.endswith("gz") else pa.compress(data, "zstd", asbytes=True))
        with pytest.raises(ValueError, match=r"bomb.*:1: longer than 1 MiB"):
            read_chats([path])


def test_prompts(tmp_path):
    rows = [{"id": "p", "source": "maths", "turns": ["One?", "Two?"]}, {"turns": ["Ü?"]}]
    first, second = read_prompts([write(tmp_path / "e.jsonl.gz", *rows)])
    assert (first.id, first.source, first.turns) == ("p", "maths", ("One?", "Two?"))
    assert (second.id, second.source, second.turns) == ("e-2", "e", ("Ü?",))
    assert (first.system, first.tools) == ("", ())


def test_prompts_of_other_forms_have_their_system_message_and_tools(tmp_path):
    rows = [
        {"turns": ["One?"], "system": "Be brief.", "tools": '[{"name": "f"}]'},
        {"messages": [{"role": "system", "content": "S"}, *TURNS, TURNS[0], {"role": "tool", "content": "9"}, *TURNS]},
        {"prompt": "Q", "completion": "A"},
        {"instruction": "Add", "input": "1 2"},
    ]
    prompts = read_prompts([write(tmp_path / "e.jsonl", *rows)])
    assert [prompt.turns for prompt in prompts] == [("One?",), ("Hi", "Hi"), ("Q",), ("Add\n\n1 2",)]
    assert [prompt.system for prompt in prompts] == ["Be brief.", "S", "", ""]
    assert prompts[0].tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    "row, error",
    [
        ({"turns": []}, "'turns' is empty; give"),
        ({"turns": "Hi"}, "'turns' is a string; expected a list"),
        ({"turns": ["Hi", 3]}, "turn 2 is a number; expected a string"),
        ({"answer": "Hi"}, "neither messages nor a question"),
        ({"messages": TURNS[1:]}, "no user's turn"),
        ({"text": "Hi"}, "a text or tokens ask nothing"),
        ({"turns": ["Hi"], "tools": [{}]}, "tool 1 of 'tools' is no definition"),
    ],
)
def test_bad_prompts_are_named(tmp_path, row, error):
    with pytest.raises(ValueError, match=rf"p\.jsonl:1: {error}"):
        read_prompts([write(tmp_path / "p.jsonl", row)])
