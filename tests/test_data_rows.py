"""Which files a name stands for, and that every kind of file gives the same rows."""

import csv
import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsfdd.data.chat import read_chat_files, read_chats
from jsfdd.data.hub import dataset_rows
from jsfdd.data.rows import InputFile, expand_names, input_digests

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 👋"}]
ROWS = [
    {"id": "a", "source": "s", "messages": TURNS},
    {
        "id": 7,
        "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": ""}],
    },
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"prompt": "Say", "completion": "so"},
]


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".parquet", ".arrow", ".csv"):
        return write_columns(path, rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    data = json.dumps(list(rows), indent=1).encode() if ".json" in path.suffixes else lines
    pack = {".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def write_columns(path, rows):
    """As Parquet, as an Arrow file, or as CSV with lists and objects as JSON text."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [str(row[key]) if key == "id" and key in row else row.get(key) for row in rows] for key in keys}
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            cells = [
                [json.dumps(value) if isinstance(value, list) else value for value in column] for column in columns.values()
            ]
            writer.writerows(zip(*cells))
    elif path.suffix == ".arrow":
        table = pa.table(columns)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "ending",
    ["jsonl", "ndjson", "json", "JSONL", "jsonl.gz", "json.gz", "jsonl.zst", "json.zst", "parquet", "arrow", "csv"],
)
def test_every_kind_of_file_gives_the_same_chats(tmp_path, ending):
    chats = read_chats([write(tmp_path / f"x.{ending}", *ROWS)])
    assert [chat.id for chat in chats] == ["a", "7", "x-3", "x-4"]
    assert [chat.source for chat in chats] == ["s", "x", "x", "x"]
    assert [[(m["role"], m["content"]) for m in chat.messages] for chat in chats] == [
        [("user", "Hi"), ("assistant", "Hello 👋")],
        [("system", "S"), ("user", "Q"), ("assistant", "")],
        [("user", "Add\n\n1 2"), ("assistant", "3")],
        [("user", "Say"), ("assistant", "so")],
    ]


def test_zstd_frames_one_after_the_other_are_all_read(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    frames = [pa.compress(json.dumps({"messages": TURNS * n}).encode() + b"\n", "zstd", asbytes=True) for n in (1, 2)]
    path.write_bytes(b"".join(frames))
    assert [chat.place for chat in read_chats([path])] == [f"{path}:1", f"{path}:2"]


def test_a_parquet_row_is_named_and_other_columns_are_not_read(tmp_path):
    path = write(tmp_path / "x.parquet", {"prompt": "Q", "response": "A", "blob": b"\x00"}, {"prompt": "Q"})
    with pytest.raises(ValueError, match=r"x\.parquet: row 2: no assistant turn"):
        read_chats([path])
    path = write(tmp_path / "y.parquet", {"blob": b"\x00"})
    with pytest.raises(ValueError, match=r"y\.parquet: no column of .*turns.*; it has blob; rename"):
        read_chats([path])


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_columns_that_are_not_read_are_counted_in_rows_that_have_them(tmp_path, ending):
    rows = [{"prompt": f"Q{i}", "response": "A", "score": i or None, "kwargs": {"a": 1}, "none": None} for i in range(5)]
    found = read_chat_files([write(tmp_path / f"x.{ending}", *rows)])
    assert found.unread == {"score": 4, "kwargs": 5} and len(found.chats) == 5


def test_lists_in_parquet_as_json_text_or_as_an_object_of_lists(tmp_path):
    texts = {"messages": [json.dumps(TURNS)], "tools": [json.dumps([{"name": "f"}])]}
    pq.write_table(pa.table(texts), tmp_path / "text.parquet")
    lists = {"conversations": [{"from": ["human", "gpt"], "value": ["Hi", "Hello 👋"]}]}
    pq.write_table(pa.table(lists), tmp_path / "lists.parquet")
    maps = pa.array([[list(turn.items()) for turn in TURNS]], pa.list_(pa.map_(pa.string(), pa.string())))
    pq.write_table(pa.table({"messages": maps}), tmp_path / "maps.parquet")
    names = ("text.parquet", "lists.parquet", "maps.parquet")
    text, whole, mapped = (read_chats([tmp_path / name])[0] for name in names)
    assert list(text.messages) == list(whole.messages) == list(mapped.messages) == TURNS
    assert text.tools == ({"type": "function", "function": {"name": "f"}},)


def save_to_disk(folder, *tables):
    """A dataset as the datasets library's save_to_disk lays it out, a stream a table, and a cache file beside."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, rows in [*zip(names, tables), ("cache-1.arrow", [{"messages": TURNS * 9}])]:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_dataset_that_was_saved_to_disk(tmp_path):
    one = save_to_disk(tmp_path / "one", [{"messages": TURNS}], [{"messages": TURNS * 2}])
    assert [len(chat.messages) for chat in read_chats([one])] == [2, 4]
    for split in ("test", "train"):
        save_to_disk(tmp_path / "two" / split, [{"messages": TURNS * (3 if split == "train" else 4)}])
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert [len(chat.messages) for chat in read_chats([tmp_path / "two"])] == [6]
    assert [len(chat.messages) for chat in read_chats([tmp_path / "two" / "test"])] == [8]
    (one / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00001-of-00002\.arrow: no such file, but .*state\.json names it"):
        read_chats([one])
    (one / "state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"state\.json: no list of data files"):
        read_chats([one])
    (tmp_path / "two" / "train" / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"two: a saved dataset with the splits test; name one"):
        read_chats([tmp_path / "two"])


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = write(tmp_path / "x.parquet", *ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"x\.parquet: cannot be read as Parquet"):
        read_chats([path])


def _tree(folder):
    for name in ("b.jsonl", "a/x.jsonl.gz", "a/y.json", "z.parquet", ".hidden/h.jsonl", "a/.h.jsonl"):
        write(folder / name, {"messages": [*TURNS, {"role": "user", "content": name}]})
    (folder / "README.md").write_text("not data")
    return folder


def test_a_directory_stands_for_its_files_in_order(tmp_path):
    folder = _tree(tmp_path / "data")
    names = ["a/x.jsonl.gz", "a/y.json", "b.jsonl", "z.parquet"]
    assert expand_names([folder]) == [InputFile(str(folder / name), name.split(".")[0]) for name in names]
    assert [chat.id for chat in read_chats([folder])] == ["a/x-1", "a/y-1", "b-1", "z-1"]
    before = input_digests([folder])
    assert list(before) == [str(folder / name) for name in names]
    write(folder / "a/new.jsonl", ROWS[0])
    after = input_digests([folder])
    assert set(after) - set(before) == {str(folder / "a/new.jsonl")} and before.items() <= after.items()


def test_a_pattern_stands_for_its_matches_in_order(tmp_path):
    folder = _tree(tmp_path / "data")
    found = [str(folder / "a/x.jsonl.gz"), str(folder / "a/y.json")]
    assert [file.path for file in expand_names([folder / "a" / "*"])] == found
    assert [file.stem for file in expand_names([f"{folder}/**/*.jsonl*"])] == ["a/x", "b"]
    literal = write(folder / "c[1].jsonl", ROWS[0])  # a file of that name comes before its meaning as a pattern
    assert [file.path for file in expand_names([literal])] == [str(literal)]
    with pytest.raises(ValueError, match=r"README\.md: unknown file ending"):
        expand_names([folder / "*.md"])


def test_names_that_stand_for_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, error in (("*.jsonl", "pattern matches no file"), ("empty", "no chat or prompt file in this directory")):
        with pytest.raises(FileNotFoundError, match=error):
            expand_names([tmp_path / name])
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file; check"):
        expand_names([tmp_path / "gone.jsonl"])


class FakeDataset:
    """What is used of `datasets.Dataset`."""

    def __init__(self, rows):
        self.rows, self.column_names = rows, list(rows[0])

    def select_columns(self, names):
        return FakeDataset([{name: row[name] for name in names} for row in self.rows])

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)


@pytest.fixture
def hub(monkeypatch):
    """A module `datasets` that knows one dataset and is otherwise offline; returns the calls."""
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if name != "org/chats":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)")
        if split != "train":
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")
        return FakeDataset([{"messages": [turn | {"name": None} for turn in TURNS], "picture": object()}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_dataset_by_name(hub):
    [chat] = read_chats(["hf:org/chats"])
    assert (chat.id, chat.place, chat.messages) == ("org-chats-1", "hf:org/chats: row 1", tuple(TURNS))
    assert read_chats(["hf:org/chats@main:train"])[0].id == "org-chats-main-train-1"
    assert hub == [("org/chats", None, "train"), ("org/chats", "main", "train")]
    # Two objects of one kind have different reprs, and the digest must not depend on them.
    assert input_digests(["hf:org/chats"]) == input_digests(["hf:org/chats"])


def test_a_dataset_out_of_reach_or_misnamed(hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"hf:org/gone: not in the cache.*ConnectionError.*give a downloaded copy's"):
        read_chats(["hf:org/gone"])
    with pytest.raises(ValueError, match=r"hf:org/chats:dev: Unknown split \"dev\".*; name another split or config"):
        read_chats(["hf:org/chats:dev"])
    with pytest.raises(ValueError, match=r"hf:org/chats: no column of turns; it has messages, picture"):
        list(dataset_rows("hf:org/chats", ["turns"]))
    with pytest.raises(ValueError, match=r"hf:a/b/c/d: a dataset is named hf:NAME"):
        read_chats(["hf:a/b/c/d"])
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"needs the package datasets; run: pip install 'jsfdd\[datasets\]'"):
        read_chats(["hf:org/chats"])
