"""A table of samples is a sequence like any other, and other processes make the same one."""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from children import Child
from families import answer, family_tokenizer, user
from toy import toy_tokenizer

from jsfdd.base.records import Sample, samples_digest
from jsfdd.data import tokenized
from jsfdd.data.chat import read_chat_files
from jsfdd.data.counts import count_by_file
from jsfdd.data.samples import SampleWriter
from jsfdd.data.template import tokenize_chats
from jsfdd.data.tokenized import read_samples


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_a_table_is_a_sequence_of_the_samples_that_were_appended():
    rng = np.random.default_rng(0)
    samples = [
        Sample(f"é{i}", f"s{i % 3}", rng.integers(0, 99, n, np.int32), rng.random(n) < 0.5)
        for i, n in enumerate([*rng.integers(0, 9, 5000), 3])
    ]
    writer = SampleWriter()
    for sample in samples:
        writer.append(sample)
    table = writer.finish()
    assert len(table) == len(samples) and table.lengths.tolist() == [len(sample.tokens) for sample in samples]
    assert samples_digest(table) == samples_digest(samples)
    for i in (0, 4095, 4096, 5000, -1, -5001):
        np.testing.assert_array_equal(table[i].tokens, samples[i].tokens)
        np.testing.assert_array_equal(table[i].assistant_mask, samples[i].assistant_mask)
        assert (table[i].id, table[i].source, table[i].tokens.dtype) == (samples[i].id, samples[i].source, np.int32)
    assert [sample.id for sample in table[-3:]] == [sample.id for sample in samples[-3:]]
    with pytest.raises(IndexError):
        table[5001]
    assert list(SampleWriter().finish()) == []


@pytest.fixture
def files(tmp_path):
    """Two files with every kind of row: kept, cut, twice, without an answer, refused by form, with special text, empty."""
    long = [turns(f"question {i}", "long answer " * 12 if i % 7 == 0 else f"answer {i}") for i in range(60)]
    bad = [{"messages": []}, turns("only a question"), turns("<|im_end|>", "x"), turns("q", "")]
    return [write(tmp_path / "a.jsonl", [*long, *long[:2]]), write(tmp_path / "b.jsonl", [*bad, long[5], turns("so", "it is")])]


def _same(table, samples):
    assert [sample.id for sample in table] == [sample.id for sample in samples]
    assert samples_digest(table) == samples_digest(samples)


def test_a_stream_gives_what_reading_and_tokenizing_one_after_the_other_does(files):
    found = read_chat_files(files)
    samples, summary = tokenize_chats(found.chats, toy_tokenizer(), 100)
    read = read_samples(files, toy_tokenizer(), 100)
    _same(read.samples, samples)
    assert read.summary == summary and read.files == count_by_file(found, summary)
    first, second = read.files
    assert (first.read, first.kept, first.truncated, first.skipped) == (62, 60, 9, {"duplicates": 2})
    assert second.skipped == {"duplicates": 1, "empty": 1, "no_answer": 1, "special_text": 1, "no_counted": 1}
    assert str(second).startswith(
        f"{files[1]}: 6 read, 1 kept; skipped: 1 duplicates, 1 empty conversations, 1 without an answer"
    )
    with pytest.raises(
        ValueError, match=r"3 of 68 rows cannot .*more than --max-skipped 1%:\n  1 empty conversations; first .*b"
    ):
        read_samples(files, toy_tokenizer(), 100, max_skipped=0.01)
    with pytest.raises(ValueError, match=r"b\.jsonl:1: the conversation is empty"):
        read_samples(files, toy_tokenizer(), 100, strict=True)


def test_other_processes_make_the_same_samples(files, monkeypatch):
    alone = read_samples(files, toy_tokenizer(), 100)
    monkeypatch.setattr(tokenized, "_CHUNK", 8)
    monkeypatch.setattr(tokenized, "_ALONE", 1)
    together = read_samples(files, toy_tokenizer(), 100, processes=2)
    _same(together.samples, list(alone.samples))
    assert together[1:] == alone[1:]


def test_answers_beyond_the_cut_are_counted_and_their_conversation_is_read_once(tmp_path):
    """With --split-answers: of 12 answers, those whose prompt alone is too long make no sample."""
    messages = [
        message
        for i in range(12)
        for message in (user(f"q{i}"), answer(f"a{i}", reasoning_content="a thought"))
    ]  # fmt: skip
    path = write(tmp_path / "s.jsonl", [{"messages": messages}, turns("q", "")])
    read = read_samples([path], family_tokenizer("qwen3"), 200, split_answers=True)
    [counts] = read.files
    made = len(read.samples)
    assert 0 < made < 12 and (counts.read, counts.kept, counts.skipped) == (2, 1, {"no_counted": 1})
    assert [sample.id for sample in read.samples] == [f"s-1/{number}" for number in range(1, made + 1)]
    assert read.summary.kept == 1 and f"{12 - made} answers have no token within the maximal length" in "".join(read.notes)


def test_an_id_that_is_also_that_of_an_answer_is_named(tmp_path):
    messages = [message for i in range(2) for message in (user(f"q{i}"), answer(f"a{i} b", reasoning_content="a thought"))]
    split = {"id": "x", "messages": messages}
    read = lambda *rows: read_samples(  # noqa: E731
        [write(tmp_path / "s.jsonl", rows)], family_tokenizer("qwen3"), 200, split_answers=True
    )
    for rows in ([split, turns("so", "it is") | {"id": "x/1"}], [turns("so", "it is") | {"id": "x/2"}, split]):
        with pytest.raises(ValueError, match=r"s\.jsonl: id 'x/[12]' is also that of an answer of conversation 'x'"):
            read(*rows)
    other = read(split, turns("so", "it is") | {"id": "x/3"})
    assert [sample.id for sample in other.samples] == ["x/1", "x/2", "x/3"]


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"none of 1 conversations .*\n  1 without a counted token"):
        read_samples([write(tmp_path / "c.jsonl", [turns("q", "")])], toy_tokenizer(), 100)


def test_an_answer_of_a_token_beyond_the_embedding_is_named(tmp_path):
    rows = [turns("q", "a good answer"), turns("q", "<|im_start|>") | {"text": None}]
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    rows[1] = turns("q", "an <extra> token")
    read = read_samples([write(tmp_path / "c.jsonl", rows)], tokenizer, 100, vocab_size=258)
    assert len(read.samples) == 1 and "token <extra> (258), which the model of 258 rows" in read.summary.first["unknown_token"]


def _begin_and_wait(path):
    settings = (toy_tokenizer(), 100, (), {"vocab_size": None, "split_answers": False})
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), tokenized._begin, settings) as pool:
        path.write_text(str(pool.submit(os.getpid).result()))
        time.sleep(600)


def _runs(pid):
    """Not so of a process that has ended and that nobody has asked about."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"  # noqa: SIM115
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_other_processes_end_when_the_first_is_killed(tmp_path):
    first, path = Child(_begin_and_wait, tmp_path / "pid"), tmp_path / "pid"
    while not (path.exists() and path.read_text()):
        assert first.running
        time.sleep(0.05)
    first.kill()
    until = time.monotonic() + 60
    while _runs(int(path.read_text())):
        assert time.monotonic() < until
        time.sleep(0.05)
