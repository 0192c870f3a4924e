"""Reading chat and prompt files: duplicates, ids, and every way a file or a row can be wrong."""

import gzip
import json

import pyarrow as pa
import pytest

from jsfdd.data import rows as files
from jsfdd.data.chat import read_chat_files, read_chats, read_prompts

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
    with pytest.raises(ValueError, match=r"c\.json:5: entry 2: .*exactly one of"):
        read_chats([path])


def test_an_id_of_two_conversations_names_both_places(tmp_path):
    first = write(tmp_path / "one.jsonl", ROW)
    second = write(tmp_path / "two.jsonl", {"messages": TURNS * 2}, ROW | {"messages": TURNS * 3})
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
    "row, error",
    [
        ([], "found a list; a row is an object"),
        ({}, "exactly one of .* found none of them"),
        (ROW | {"conversations": []}, "found 'messages' and 'conversations'"),
        ({"messages": []}, "the conversation is empty; add"),
        ({"messages": "Hi"}, "'messages' is a string; expected a list"),
        ({"messages": ["Hi"]}, "message 1 is a string; expected {'role'"),
        ({"messages": TURNS[:1]}, "no assistant turn, .*; add an answer"),
        ({"messages": [{"content": "Hi"}]}, "message 1: 'role' is missing; add it"),
        ({"messages": [{"role": "user"}]}, "message 1: 'content' is missing; add it"),
        (message(role="robot"), "message 1 has the unknown role 'robot'; use one of system, user, assistant"),
        (message(role="my number is " + "5" * 99), "the unknown role 'my number is 55555555555555555'; use"),
        (message(role=None), "message 1: 'role' is null; expected a string"),
        (message(content=None), "message 1: 'content' is null; expected a string"),
        (message(content=["Hi"]), "message 1: 'content' is a list; expected a string"),
        (message(content="\ud83d!"), "'content' holds half a surrogate pair at character 0; remove it"),
        ({"conversations": [{"from": "bot", "value": ""}]}, "unknown role 'bot'; use one of system, user, .*human"),
        (message(content=[{"type": "image_url"}]), "message 1: part 1 is no text; only text"),
        (message(content=[{"type": "text"}]), "message 1: part 1: 'text' is missing"),
        (message("assistant", None, tool_calls=[]), "'content' is null"),
        (message("assistant", None, tool_calls="f"), "'tool_calls' is a string; expected a list"),
        (message("assistant", None, tool_calls=["f"]), "message 1: tool call 1 is a string; expected {'function'"),
        (message("assistant", None, tool_calls=[{"function": {}}]), "message 1: tool call 1: 'name' is missing"),
        (message("assistant", None, function_call={"name": "f", "arguments": 3}), "'arguments' is a number; expected"),
        (message("assistant", truncated="yes"), "message 1: 'truncated' is a string; expected true or false"),
        (message("tool", tool_call_id=3), "'tool_call_id' is a number; expected a string"),
        ({"prompt": "Q"}, "one of 'response', 'completion'; found neither"),
        ({"prompt": "Q", "response": "A", "completion": "A"}, "found 'response' and 'completion'"),
        ({"prompt": 3, "response": "A"}, "'prompt' is a number; expected a string"),
        ({"prompt": [], "response": "A"}, "the conversation is empty"),
        (ROW | {"system": 3}, "'system' is a number; expected a string"),
        ({"instruction": "Q"}, "'output' is missing; add it"),
        ({"instruction": "Q", "input": 3, "output": ""}, "'input' is a number; expected a string"),
        (ROW | {"id": True}, "'id' is true or false; expected a string"),
        (ROW | {"source": {}}, "'source' is an object; expected a string"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, error):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: .*{error}"):
        read_chats([path])


GOOD = json.dumps(ROW).encode()
ZSTD = pa.compress(GOOD, "zstd", asbytes=True)


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
        ("f.json", GOOD + b"\n" + GOOD, r"f.json:1: a .json file holds one list .*\.jsonl"),
        ("f.json", b"", r"f.json:1: a .json file holds one list"),
        ("f.json", b"[" + GOOD, r"f.json:1: expected ',' or '\]' after entry 1; is the file cut off"),
        ("f.json", b"[\n" + GOOD + b",]", r"f.json:2: entry 2: malformed JSON"),
        ("f.json", b"[,", r"f.json:1: entry 1: malformed JSON"),
        ("f.json", b"[\n", r"f.json:2: entry 1: malformed JSON"),
        ("f.json", b"[\n" + GOOD + b"\n]\n]", r"f.json:4: text after the closing"),
        ("f.txt", GOOD, r"f.txt: unknown file ending; expected .jsonl or .json"),
        (".json", GOOD, r".json: unknown file ending"),
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
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1 << 20)
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


@pytest.mark.parametrize(
    "row, error",
    [
        ({"turns": []}, "'turns' is empty; give"),
        ({"turns": "Hi"}, "'turns' is a string; expected a list"),
        ({"turns": ["Hi", 3]}, "turn 2 is a number; expected a string"),
        ({"prompt": "Hi"}, "'turns' is missing; add it"),
    ],
)
def test_bad_prompts_are_named(tmp_path, row, error):
    with pytest.raises(ValueError, match=rf"p\.jsonl:1: {error}"):
        read_prompts([write(tmp_path / "p.jsonl", row)])
