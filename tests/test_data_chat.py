"""Reading chat and prompt files: the formats, and every way a file can be wrong."""

import gzip
import json

import pytest

from jsfdd.data import chat
from jsfdd.data.chat import read_chats, read_prompts

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 👋"}]
ROW = {"id": "a", "source": "s", "messages": TURNS}


def write(path, *rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = json.dumps(list(rows), indent=1).encode() if ".json" in path.suffixes else lines.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz"])
def test_formats_and_endings(tmp_path, name):
    sharegpt = {
        "id": 7,
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": ""},
        ],
    }
    alpaca = {"instruction": "Add", "input": "1 2", "output": "3"}
    without_input = {"instruction": "Say", "input": "", "output": "so"}
    chats = read_chats([write(tmp_path / name, ROW, sharegpt, alpaca, without_input)])
    assert [c.id for c in chats] == ["a", "7", "x-3", "x-4"]
    assert [c.source for c in chats] == ["s", "x", "x", "x"]
    assert [[(m["role"], m["content"]) for m in c.messages] for c in chats] == [
        [("user", "Hi"), ("assistant", "Hello 👋")],
        [("system", "S"), ("user", "Q"), ("assistant", "")],
        [("user", "Add\n\n1 2"), ("assistant", "3")],
        [("user", "Say"), ("assistant", "so")],
    ]


def test_lines_are_counted_with_blank_ones_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "c.jsonl"
    row = json.dumps({"messages": TURNS})
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\n\n  \n{row}".encode())
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


def test_a_duplicate_id_names_both_places(tmp_path):
    first, second = write(tmp_path / "one.jsonl", ROW), write(tmp_path / "two.jsonl", {"messages": TURNS}, ROW)
    with pytest.raises(ValueError, match=r"two\.jsonl:2: id 'a' was already used at .*one\.jsonl:1; make ids unique"):
        read_chats([first, second])
    with pytest.raises(ValueError, match=r"one\.jsonl:1: id 'a' was already used at .*one\.jsonl:1"):
        read_chats([first, first])


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
        (message(role="tool"), "message 1 has the unknown role 'tool'; use one of system, user, assistant"),
        (message(role=None), "message 1: 'role' is null; expected a string"),
        (message(content=None), "message 1: 'content' is null; expected a string"),
        (message(content=["Hi"]), "message 1: 'content' is a list; expected a string"),
        (message(content="\ud83d!"), "'content' holds half a surrogate pair at character 0; remove it"),
        ({"conversations": [{"from": "bot", "value": ""}]}, "unknown role 'bot'; use one of system, human"),
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
        ("f.jsonl", gzip.compress(GOOD), r"f.jsonl:1: invalid UTF-8 .*; this is gzip data: add .gz"),
        ("f.jsonl.gz", GOOD, r"f.jsonl.gz:1: cannot be unpacked as gzip .*; copy the file again, or drop .gz"),
        ("f.jsonl.gz", gzip.compress(GOOD)[:-9], r"f.jsonl.gz:\d: cannot be unpacked as gzip"),
        ("f.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), r"f.jsonl.gz:\d: cannot be unpacked as gzip"),
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


def test_gzip_that_unfolds_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(chat, "MAX_JSON_BYTES", 1 << 20)
    for ending in ("jsonl.gz", "json.gz"):
        path = tmp_path / f"bomb.{ending}"
        path.write_bytes(gzip.compress(b" " * (1 << 24)))
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
