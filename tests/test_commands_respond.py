"""`jsfdd respond`: the target's own answers, whatever they are batched with and however often the process was killed."""

import dataclasses
import functools
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import Child, begin_command, finish
from toy import toy_draft, toy_target, toy_tokenizer, write_target

from jsfdd.commands import respond, score
from jsfdd.commands.cli import main
from jsfdd.commands.options import flat, from_options
from jsfdd.commands.respond import RespondConfig
from jsfdd.data.chat import read_chats
from jsfdd.data.template import render_prompt, tokenize_chats
from jsfdd.decoding import conversation_log
from jsfdd.decoding import conversations as answers
from jsfdd.decoding.conversation_log import Answer, AnsweredBatch, append_batch, open_log, read_log
from jsfdd.models.target import head_logits, hidden_states
from jsfdd.weights.export import write_draft
from jsfdd.weights.target import Target, load_target

pytestmark = pytest.mark.slow

LETTERS = toy_tokenizer().encode("abcdefghijklmnopqrstuvwxyz .,?")
# Some letters end an answer, so that some answers end by themselves and some are cut.
STOPS = [257, *LETTERS[::16]]
LONGEST = 24


def letter_target():
    """Says letters alone when it is greedy, so that text stands for the very tokens that were generated."""
    config, params = toy_target(0, vocab_size=258, max_position=1024, num_layers=1)
    said = jnp.zeros(258).at[jnp.array(LETTERS)].set(1.0)
    head = {"kernel": params["head"]["kernel"] * said[None]}
    return Target(config, params | {"head": head}, toy_tokenizer(), "toy", "toy", tuple(STOPS))


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """All tests of one setup share its programs; compiling is most of what they take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "make_generate", functools.cache(answers.make_generate))
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory with a target and 11 chats of one to three turns, in prompts of two widths."""
    folder = tmp_path_factory.mktemp("inputs")
    target = write_target(folder / "target", target=letter_target())
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | {"eos_token_id": STOPS}))
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(11):
            turns = [f"{number} {turn} " + "hm " * (number * 3 % 10) for turn in range(1 + number % 3)]
            said = [[{"role": "user", "content": text}, {"role": "assistant", "content": "not mine"}] for text in turns]
            file.write(json.dumps({"id": f"c{number}", "source": "toy", "messages": sum(said, [])}) + "\n")
    return folder


def config_of(inputs, out, **changes):
    values = dict(
        target=str(inputs / "target"), data=(inputs / "chats.jsonl",), out=Path(out), max_new_tokens=LONGEST, batch_size=4
    )
    return from_options(RespondConfig, **(values | changes))


def replaced(config, **options):
    return from_options(RespondConfig, **(flat(config) | options))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """(config, responses) of one uninterrupted run."""
    config = config_of(inputs, tmp_path_factory.mktemp("finished") / "answers.jsonl")
    return config, respond.respond(config)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(path):
    """{id: the assistant's messages}"""
    return {row["id"]: [m for m in row["messages"] if m["role"] == "assistant"] for row in rows_of(path)}


def test_rows_keep_what_was_asked_and_say_how_they_were_answered(finished):
    config, responses = finished
    chats, rows = read_chats(config.data), rows_of(config.out)
    assert [row["id"] for row in rows] == [chat.id for chat in chats] and {row["source"] for row in rows} == {"toy"}
    for row, chat, conversation in zip(rows, chats, responses.conversations, strict=True):
        asked = [m for m in chat.messages if m["role"] == "user"]
        kept = [m for m in row["messages"] if m["role"] == "user"]
        assert kept == asked[: len(kept)] and (len(kept) == len(asked) or conversation.ended == "truncated")
        assert "not mine" not in json.dumps(row["messages"])
    counts = responses.counts()
    said = [m for row in rows for m in row["messages"] if m["role"] == "assistant"]
    assert counts["answers"] == len(said) and counts["truncated_answers"] == sum("truncated" in m for m in said)
    assert 0 < counts["truncated_answers"] < counts["answers"] and counts["ended_after_truncated"] > 0  # both occur
    made = rows[0]["answered_by"]
    assert (made["target"], made["temperature"], made["seed"]) == ("target", 0.0, 0)
    assert made["fingerprint"] == load_target(config.model.target).fingerprint


def test_greedy_answers_are_the_argmax_of_the_whole_text_read_again(finished):
    """The slow obvious way: one token after the other, the target over the whole text each time, one conversation alone."""
    config, _ = finished
    target = load_target(config.model.target)

    @jax.jit
    def next_token(tokens, length):
        hidden = hidden_states(target.config, target.params, tokens[None])[0, length - 1]
        return jnp.argmax(head_logits(target.config, target.params, hidden))

    for row in rows_of(config.out):
        for number, message in enumerate(row["messages"]):
            if message["role"] != "assistant":
                continue
            text = np.zeros(512, np.int32)
            prompt = render_prompt(target.tokenizer, row["messages"][:number])
            text[: len(prompt)] = prompt
            length = len(prompt)
            while length < len(prompt) + LONGEST and (length == len(prompt) or text[length - 1] not in STOPS):
                text[length] = next_token(text, length)
                length += 1
            expected = target.tokenizer.decode(text[len(prompt) : length], skip_special_tokens=True)
            cut = text[length - 1] not in STOPS
            assert message.get("truncated", False) == cut
            assert message["content"] == (expected.rstrip("\ufffd") if cut else expected)


def test_answers_do_not_depend_on_what_they_are_batched_with(inputs, tmp_path):
    few = config_of(inputs, tmp_path / "few.jsonl", batch_size=4, temperature=0.8)
    many = dataclasses.replace(few, out=tmp_path / "many.jsonl", batch_size=8)
    respond.respond(few), respond.respond(many)
    assert few.out.read_bytes() == many.out.read_bytes()
    other = dataclasses.replace(few, out=tmp_path / "other.jsonl", seed=1)
    respond.respond(other)
    before, after = answers_of(few.out), answers_of(other.out)
    assert sum(before[name] != after[name] for name in before) > 5


def test_every_row_is_drawn_with_a_key_of_its_own(inputs, tmp_path):
    """The same question with two systems that the template does not write: only the key can tell the answers apart."""
    target = tmp_path / "target"
    target.mkdir()
    for path in (inputs / "target").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (template,) = target.glob("chat_template*")
    users_alone = "for message in messages if message.role == 'user'"
    template.write_text(template.read_text().replace("for message in messages", users_alone))
    rows = [{"messages": [{"role": "system", "content": name}, {"role": "user", "content": "hello"}]} for name in "ab"]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {}
    for temperature in (0.0, 1.0):
        config = config_of(tmp_path, tmp_path / f"{temperature}.jsonl", temperature=temperature)
        respond.respond(config)
        said[temperature] = [text[0] for text in answers_of(config.out).values()]
    assert said[0.0][0] == said[0.0][1] and said[1.0][0] != said[1.0][1]


def respond_until_killed(inputs, out, batches):
    """Runs until so many batches are on the disk and a part of the next, and then dies as in a power cut."""
    written = 0

    def append(path, batch):
        nonlocal written
        if written == batches:
            with path.open("ab") as file:
                file.write(json.dumps(batch._asdict()).encode()[:70])
            os.kill(os.getpid(), signal.SIGKILL)
        append_batch(path, batch)
        written += 1

    conversation_log.append_batch = append
    respond.respond(config_of(inputs, out))


def test_killed_it_continues_to_the_same_file(inputs, finished, tmp_path, monkeypatch):
    config, _ = finished
    out = tmp_path / "answers.jsonl"
    code, _, errors = Child(respond_until_killed, inputs, out, 2).finish()
    assert code == -signal.SIGKILL, errors
    parts, whole = respond.parts_of(out), respond.parts_of(config.out).read_bytes()
    left = parts.read_bytes()
    assert not out.exists() and left.count(b"\n") == 3 < whole.count(b"\n") and not left.endswith(b"\n")
    decoded = count_batches(monkeypatch)
    again = respond.respond(replaced(config, out=out))
    assert len(decoded) == whole.count(b"\n") - 3
    assert out.read_bytes() == config.out.read_bytes() and parts.read_bytes() == whole
    assert again.counts() == finished[1].counts()


def count_batches(monkeypatch):
    """A list that grows by one with every batch that is decoded."""
    decoded, make = [], answers.make_generate

    def make_counting(*arguments):
        decode = make(*arguments)
        return lambda *inputs: decoded.append(1) or decode(*inputs)

    monkeypatch.setattr(answers, "make_generate", make_counting)
    return decoded


def test_a_second_call_decodes_nothing(finished, monkeypatch):
    config, responses = finished
    before = config.out.read_bytes()
    decoded = count_batches(monkeypatch)
    config.out.unlink()  # killed before the last step
    again = respond.respond(config)
    assert list(again.conversations) == list(responses.conversations) and again[1:] == responses[1:]
    assert config.out.read_bytes() == before and not decoded


def test_changed_options_and_inputs_are_refused_by_name(inputs, finished, tmp_path):
    config, _ = finished
    before = respond.parts_of(config.out).read_bytes()
    more = tmp_path / "more.jsonl"
    more.write_bytes(config.data[0].read_bytes() + b"\n")
    for change, words in [
        ({"temperature": 0.5}, "temperature: found 0.0, expected 0.5"),
        ({"seed": 1}, "seed: found 0, expected 1"),
        ({"turns": "first"}, "turns: found 'all', expected 'first'"),
        ({"max_new_tokens": 8}, "max_new_tokens: found 24, expected 8"),
        ({"data": (more,)}, "data: found"),
    ]:
        with pytest.raises(ValueError, match=f"{words}.*choose another --out"):
            respond.respond(replaced(config, **change))
    assert respond.parts_of(config.out).read_bytes() == before
    other = tmp_path / "mine.jsonl"
    other.write_text("mine")
    with pytest.raises(FileExistsError, match="already there"):
        respond.respond(replaced(config, out=other))
    with pytest.raises(ValueError, match="--out: .*ends in .jsonl"):
        replaced(config, out=tmp_path / "answers.json")
    assert other.read_text() == "mine"


def test_a_log_cut_at_any_byte_keeps_its_whole_batches(tmp_path):
    path, identity = tmp_path / "x.parts", {"seed": 0, "stop": (1, 2)}
    batches = [AnsweredBatch(i, [i, 7], [Answer('"é\n', 3, False), Answer("", 1, True)], [2, i]) for i in range(3)]
    open_log(path, identity)
    for batch in batches:
        append_batch(path, batch)
    whole = path.read_bytes()
    assert read_log(path, identity) == batches
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = max(whole[:length].count(b"\n") - 1, 0)
        assert read_log(path, identity) == batches[:kept]
        open_log(path, identity)
        for batch in batches[kept:]:
            append_batch(path, batch)
        assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="seed: found 0, expected 1"):
        read_log(path, identity | {"seed": 1})
    for damaged in (b"\x00" + whole, whole + b"[]\n", whole.replace(b'"turn": 2', b'"bend": 2')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.parts:[15]?4?: .*delete the file"):
            read_log(path, identity)


def test_first_turns_alone(inputs, finished, tmp_path):
    config = config_of(inputs, tmp_path / "first.jsonl", turns="first")
    respond.respond(config)
    every = answers_of(finished[0].out)
    assert answers_of(config.out) == {name: said[:1] for name, said in every.items()}


def test_a_conversation_ends_before_a_turn_that_has_become_too_long(inputs, tmp_path):
    """Its first prompt fits, its second one does not; where the first answer was cut, that is what ended it."""
    second = [{"role": "assistant", "content": ""}, {"role": "user", "content": "y" * 100}]
    rows = [{"messages": [{"role": "user", "content": text}, *second]} for text in "xpqzabcd"]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(inputs, tmp_path / "a.jsonl", data=(tmp_path / "chats.jsonl",), max_length=120)
    responses = respond.respond(config)
    assert [len(row["messages"]) for row in rows_of(config.out)] == [2] * 8
    for conversation in responses.conversations:
        assert conversation.ended == ("truncated" if conversation.answers[0].truncated else "too_long")
    counts = responses.counts()
    assert counts["ended_too_long"] > 0 and counts["ended_too_long"] + counts["ended_after_truncated"] == 8


def test_every_command_reads_the_answers_and_no_wrong_end_counts(finished):
    config, _ = finished
    tokenizer = load_target(config.model.target).tokenizer
    chats = read_chats([config.out])
    samples, _ = tokenize_chats(chats, tokenizer, 2048)
    of_id = {sample.id: sample for sample in samples}
    seen = set()
    for chat in chats:
        if chat.id not in of_id:  # each answer is empty, or one byte that was cut
            continue
        sample = of_id[chat.id]
        last, cut = sample.tokens[sample.assistant_mask][-1], "truncated" in chat.messages[-1]
        if chat.messages[-1]["content"]:
            assert (last == 257) == (not cut)
            seen.add(cut)
        ends = (sample.tokens[sample.assistant_mask] == 257).sum()
        assert ends == sum("truncated" not in m for m in chat.messages if m["role"] == "assistant")
    assert seen == {True, False}


def test_a_draft_changes_nothing_but_the_speed(inputs, finished, tmp_path):
    config, _ = finished
    draft, params = toy_draft(load_target(config.model.target).config)
    write_draft(tmp_path / "draft", draft, params, "vllm")
    shared = dict(draft=(tmp_path / "draft",), num_draft_tokens=2, turns="first")
    fast = replaced(config, out=tmp_path / "fast.jsonl", **shared)
    responses = respond.respond(fast)
    every = answers_of(config.out)
    assert answers_of(fast.out) == {name: said[:1] for name, said in every.items()}
    assert responses.tau >= 1 and finished[1].tau is None
    write_draft(tmp_path / "other", draft, jax.tree.map(lambda x: x * 0.5, params), "vllm")
    with pytest.raises(ValueError, match=r"drafts\.digests"):
        respond.respond(replaced(fast, draft=(tmp_path / "other",)))


def test_the_command_line(inputs, tmp_path, capsys):
    arguments = ["respond", "--target", str(inputs / "target"), "--data", str(inputs / "chats.jsonl"), "--batch-size", "4"]
    arguments += ["--max-new-tokens", str(LONGEST)]
    arguments += ["--out", str(tmp_path / "new" / "answers.jsonl")]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["conversations"], plan["answers"], plan["continues"]) == (11, 21, False)
    assert not (tmp_path / "new").exists()
    kept = [*arguments, "--keep-hidden", "flatness", "--retain-ratio"]
    planned = []
    for ratio in ("0.25", "0.5"):
        assert main([*kept, ratio, "--dry-run", "--json"]) == 0
        planned.append(json.loads(capsys.readouterr().out))
    assert planned[1]["hidden_bytes"] == pytest.approx(2 * planned[0]["hidden_bytes"], rel=0.01) and planned[0]["hidden_bytes"]
    assert planned[1]["wanted_bytes"] == plan["wanted_bytes"] + planned[1]["hidden_bytes"]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    written = sum(path.stat().st_size for path in (tmp_path / "new").glob("answers.jsonl*"))
    assert written / 2 < plan["wanted_bytes"] and plan["wanted_bytes"] == plan["answers_bytes"] < 4 * written
    assert result["chats"] == str(tmp_path / "new" / "answers.jsonl") and result["conversations"] == 11
    assert result["files"][0]["kept"] == 11 and "11 read, 11 kept" in captured.err
    assert "respond: " in captured.err and "answers/s" in captured.err or "s each" in captured.err
    assert main(arguments) == 0
    assert f"cut at --max-new-tokens {LONGEST}; ended early: " in capsys.readouterr().out
    assert main([*arguments, "--dry-run"]) == 0
    assert "continue in" in capsys.readouterr().out


def test_two_processes_answer_as_one(inputs, finished, tmp_path):
    config, _ = finished
    out = tmp_path / "answers.jsonl"
    ends = finish(
        begin_command(
            "respond",
            "--target",
            config.model.target,
            "--data",
            config.data[0],
            "--max-new-tokens",
            LONGEST,
            "--batch-size",
            4,
            "--turns",
            "first",
            "--out",
            out,
        )  # fmt: skip
    )
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2][-2000:] + ends[1][2][-2000:]
    assert answers_of(out) == {name: said[:1] for name, said in answers_of(config.out).items()}


def test_on_its_own_text_the_target_is_surer(inputs, finished, tmp_path):
    """What the command is for: greedy text is likelier than any other, so its perplexity is the lower one."""
    config, _ = finished
    shared = dict(target=config.model.target, max_length=512, batch_tokens=512)
    ppl = []
    for name, data in (("given", config.data[0]), ("own", config.out)):
        table = score.score(from_options(score.ScoreConfig, data=(data,), out=tmp_path / name, **shared))
        ppl.append(np.average(np.log(table["ppl"]), weights=table.num_tokens))
    assert ppl[1] < ppl[0] - 1
