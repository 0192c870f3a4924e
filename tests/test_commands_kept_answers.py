"""`jsfdd respond --keep-hidden`: what `respond` and then `score --keep-hidden` write, in one pass, and after any kill."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_target, toy_tokenizer, write_target

from jsfdd.commands import kept_answers, respond, score
from jsfdd.commands.options import from_options
from jsfdd.commands.respond import RespondConfig
from jsfdd.commands.score import ScoreConfig
from jsfdd.decoding import conversation_log
from jsfdd.decoding import kept as kept_module
from jsfdd.hidden import adopt as adopt_module
from jsfdd.hidden.store import HiddenStore
from jsfdd.scoring import parts as parts_module
from jsfdd.scoring import score as score_module
from jsfdd.scoring import table as table_module
from jsfdd.scoring.metrics import column_names
from jsfdd.scoring.table import read_scores
from jsfdd.selection.sfdd import select, write_selection
from jsfdd.weights.target import Target

pytestmark = pytest.mark.slow

SAID = "abcdefghijklmnopqrstuvwxyz .,?"
LETTERS = toy_tokenizer().encode(SAID)
STOPS = (257, LETTERS[3])  # the template's end of turn, and another


def talking_target():
    """Says letters, and sometimes the end of its turn."""
    config, params = toy_target(0, vocab_size=258, max_position=1024, num_layers=7)
    said = jnp.zeros(258).at[jnp.array([*LETTERS, 257])].set(1.0)
    head = {"kernel": params["head"]["kernel"] * said[None]}
    return Target(config, params | {"head": head}, toy_tokenizer(), "toy", "toy", STOPS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A target and 30 chats, three of them of two turns."""
    folder = tmp_path_factory.mktemp("inputs")
    target = write_target(folder / "target", target=talking_target())
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | {"eos_token_id": list(STOPS)}))
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(30):
            turns = [f"{number} {turn} " + "hm " * (number * 3 % 7) for turn in range(2 if number % 10 == 9 else 1)]
            said = [[{"role": "user", "content": text}, {"role": "assistant", "content": "not mine"}] for text in turns]
            row = {"id": f"c{number}", "source": "ab"[number % 2], "messages": sum(said, [])}
            file.write(json.dumps(row) + "\n")
    return folder


def config_of(inputs, folder, **changes):
    values = dict(
        target=str(inputs / "target"), data=(inputs / "chats.jsonl",), out=Path(folder) / "answers.jsonl", max_new_tokens=16,
        batch_size=8, temperature=0.4, seed=2, keep_hidden=("flatness", "random"), retain_ratio=0.3, within="source",
    )  # fmt: skip
    return from_options(RespondConfig, **(values | changes))


def results(folder):
    """(the table, {sample: its hidden states}, answers)."""
    store = HiddenStore.open(folder / "hidden", None, verify=True)
    table = read_scores(folder / "scores.parquet", prompt_states=True)
    return table, {name: np.array(store[name]) for name in sorted(store)}, (folder / "answers.jsonl").read_bytes()


def assert_same(found, expected):
    assert found[2] == expected[2] and found[0].ids == expected[0].ids and found[0].identity == expected[0].identity
    np.testing.assert_array_equal(found[0].prompt_states, expected[0].prompt_states)
    for name in column_names():
        np.testing.assert_array_equal(found[0][name], expected[0][name], err_msg=name)
    assert found[1].keys() == expected[1].keys()
    for name, states in expected[1].items():
        np.testing.assert_array_equal(found[1][name], states)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """(config, responses, results) of one uninterrupted run."""
    config = config_of(inputs, tmp_path_factory.mktemp("finished"))
    responses = respond.respond(config)
    return config, responses, results(config.out.parent)


@pytest.fixture(scope="module")
def two_passes(inputs, tmp_path_factory):
    """The results of respond without keeping, and of score on its answers."""
    folder = tmp_path_factory.mktemp("two")
    config = config_of(inputs, folder, keep_hidden=(), retain_ratio=0.5, within="all")
    respond.respond(config)
    return score_again(inputs, folder)


def score_again(inputs, folder):
    rule = dict(keep_hidden=("flatness", "random"), retain_ratio=0.3, within="source", seed=2)
    files = dict(target=str(inputs / "target"), data=(folder / "answers.jsonl",), out=folder)
    score.score(from_options(ScoreConfig, **files, **rule))
    return results(folder)


def test_it_writes_what_respond_and_score_write(finished, two_passes):
    config, responses, (table, states, text) = finished
    expected, expected_states, expected_text = two_passes
    assert text == expected_text and table.ids == expected.ids and table.sources == expected.sources
    assert table.identity == expected.identity
    np.testing.assert_array_equal(table.num_tokens, expected.num_tokens)
    np.testing.assert_allclose(table.prompt_states, expected.prompt_states, rtol=1e-4, atol=1e-4)
    for name in column_names():
        np.testing.assert_allclose(table[name], expected[name], rtol=1e-4, err_msg=name)
    assert states.keys() == expected_states.keys()
    for metric in ("flatness", "random"):
        assert states.keys() >= set(select(table, 0.3, metric=metric, within="source", seed=2).ids)
    for name, found in states.items():
        np.testing.assert_allclose(found, expected_states[name].astype(np.float32), rtol=0.02, atol=0.02)  # bfloat16
    assert not kept_answers.kept_of(config.out).exists()


def test_only_what_was_decoded_otherwise_is_read_again(finished):
    """Conversations of two answers, and those that ended at a token that is not the template's end of turn."""
    _, responses, (table, _, text) = finished
    rows = [json.loads(line) for line in text.splitlines()]
    last, stop = {row["id"]: row["messages"][-1] for row in rows}, toy_tokenizer().decode([STOPS[1]])
    single = [name for name in last if not name.endswith("9")]
    cut = [name for name in single if last[name].get("truncated")]
    other = [name for name in single if name not in cut and last[name]["content"].endswith(stop)]
    plain = [name for name in single if name not in other and set(last[name]["content"]) <= set(SAID) and last[name]["content"]]
    assert cut and other and plain and set(plain) - set(cut)  # all kinds occur
    assert responses.kept.samples == len(table)
    assert len(plain) <= responses.kept.decoded <= len(single) - len(other) and len(plain) > len(single) / 3


def test_scoring_afterwards_computes_nothing(inputs, finished, monkeypatch):
    config, _, before = finished
    plans = []
    original = score_module.run_batches
    monkeypatch.setattr(score_module, "run_batches", lambda *a, **k: plans.extend(a[3]) or original(*a, **k))
    assert_same(score_again(inputs, config.out.parent), before)
    respond.respond(config)
    assert_same(results(config.out.parent), before)
    files = dict(target=str(inputs / "target"), data=(config.out,), out=config.out.parent)
    again = from_options(ScoreConfig, **files)
    assert "samples scored before" in score.run(again, score.prepare(again)).words
    assert not plans


class Killed(BaseException):
    pass


KILLS = [
    (parts_module, "write_part", 1), (parts_module, "write_part", 3), (conversation_log, "append_batch", 2),
    (kept_module.AnswerKeeper, "add", 2), (adopt_module, "write_manifest", 1), (adopt_module, "sync", 1),
    (score_module, "summarise", 1), (table_module, "write_part", 1), (shutil, "rmtree", 1),
]  # fmt: skip


@pytest.mark.parametrize("where, name, after", KILLS, ids=[f"{name}-{after}" for _, name, after in KILLS])
def test_a_killed_run_continues_to_the_same_bits(inputs, finished, monkeypatch, tmp_path, where, name, after):
    monkeypatch.setattr(kept_answers, "_SECONDS", 0.0)
    config, calls = config_of(inputs, tmp_path), []
    with monkeypatch.context() as patch:
        original = getattr(where, name)

        def kill(*arguments, **named):
            result = original(*arguments, **named)
            calls.append(name)
            if len(calls) == after:
                raise Killed
            return result

        patch.setattr(where, name, kill)
        with pytest.raises(Killed):
            respond.respond(config)
    respond.respond(config)
    assert_same(results(tmp_path), finished[2])


def test_within_clusters_and_for_eagle3(inputs, tmp_path):
    config = config_of(inputs, tmp_path, keep_hidden=("flatness",), within="cluster", draft_kind="eagle3", retain_ratio=0.5)
    respond.respond(config)
    table, states, _ = results(tmp_path)
    assert states.keys() >= set(select(table, 0.5, within="cluster", seed=2).ids)
    assert {found.shape[1] for found in states.values()} == {4 * 32}


@pytest.mark.parametrize("changes, message", [
    (dict(keep_hidden=(), within="all"), "--retain-ratio goes with --keep-hidden"),
    (dict(keep_hidden=("flat",)), "--keep-hidden: 'flat' is unknown"),
    (dict(draft=(Path("x"),)), "leave --draft out"),
    (dict(retain_ratio=1.5), "--retain-ratio"),
])  # fmt: skip
def test_bad_options_are_named(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        respond.prepare(config_of(inputs, tmp_path, **changes))


def test_a_folder_of_other_scores_is_refused_before_anything_is_answered(inputs, tmp_path):
    (tmp_path / "hidden").mkdir()
    with pytest.raises(FileExistsError, match="hidden is there, of other answers.*choose a folder of its own"):
        respond.prepare(config_of(inputs, tmp_path))
    respond.prepare(config_of(inputs, tmp_path, keep_hidden=(), retain_ratio=0.5, within="all"))


def test_the_first_tokens_choose_which_answers_are_finished(inputs, tmp_path):
    begun = config_of(inputs, tmp_path / "begun", max_new_tokens=4, keep_hidden=("random",))
    respond.respond(begun)
    chosen = select(read_scores(tmp_path / "begun" / "scores.parquet"), 0.3, within="source")
    path = tmp_path / "begun" / "selection.json"
    write_selection(path, chosen)
    whole, finished = config_of(inputs, tmp_path / "whole"), config_of(inputs, tmp_path / "finished", selection=path)
    respond.respond(whole)
    responses = respond.respond(finished)
    # The text of an answer depends on neither batch nor selection, although it is drawn.
    rows = {json.loads(line)["id"]: line for line in whole.out.read_text().splitlines()}
    assert finished.out.read_text().splitlines() == [line for name, line in rows.items() if name in chosen.ids]
    assert responses.kept.samples == len(chosen.ids) < len(rows)
    assert set(read_scores(tmp_path / "finished" / "scores.parquet").ids) == set(chosen.ids)
    # A second call decodes nothing; one with another selection is refused.
    assert respond.respond(finished).counts() == responses.counts()
    write_selection(path, dataclasses.replace(chosen, ids=chosen.ids[1:]))
    with pytest.raises(ValueError, match="selection"):
        respond.respond(finished)


def test_a_selection_of_other_chats_or_of_another_target_is_named(inputs, tmp_path):
    respond.respond(config_of(inputs, tmp_path / "begun", max_new_tokens=4, keep_hidden=("random",)))
    chosen = select(read_scores(tmp_path / "begun" / "scores.parquet"), 0.3)
    path = tmp_path / "selection.json"
    write_selection(path, dataclasses.replace(chosen, ids=(*chosen.ids, "elsewhere")))
    with pytest.raises(ValueError, match="selection.json: it keeps 1 .* elsewhere"):
        respond.prepare(config_of(inputs, tmp_path / "other", selection=path))
    scored = chosen.inputs["scores"] | {"target": "0" * 64}
    write_selection(path, dataclasses.replace(chosen, inputs=chosen.inputs | {"scores": scored}))
    with pytest.raises(ValueError, match="selection.json: made from other inputs .* the target's weights"):
        respond.respond(config_of(inputs, tmp_path / "other", selection=path))


def test_what_a_longer_answer_leaves_no_room_for_is_skipped_and_not_called_missing(inputs, tmp_path):
    begun = config_of(inputs, tmp_path / "begun", max_new_tokens=4, max_length=80, keep_hidden=("random",))
    respond.respond(begun)
    path = tmp_path / "selection.json"
    write_selection(path, select(read_scores(tmp_path / "begun" / "scores.parquet"), 1.0))
    asked = respond.prepare(config_of(inputs, tmp_path / "later", max_new_tokens=40, max_length=80, selection=path))
    assert 0 < len(asked.questions) < asked.files[0].read == len(respond.prepare(begun).questions)
