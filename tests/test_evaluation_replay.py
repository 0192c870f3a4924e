"""Judging recorded text is decoding it: the same counts greedily, the same law when sampled."""

import jax
import numpy as np
import pytest
from toy import damped_target, loaded_target, often_right, toy_draft

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Prompt, Sample
from jsfdd.data.batches import pad_rows
from jsfdd.decoding.generate import make_generate, prepare_params
from jsfdd.decoding.prompts import bucket_width, first_prompts, prompt_batch
from jsfdd.decoding.settings import Combine, Team, TreeShape, decode_setup
from jsfdd.evaluation.acceptance import acceptance_figures
from jsfdd.evaluation.evaluate import evaluate
from jsfdd.evaluation.replay import Recorded, make_judge, record, walk, walk_text
from jsfdd.evaluation.replay_trees import make_tree_replay
from jsfdd.models.draft import Draft, DraftConfig
from jsfdd.models.target import hidden_states

pytestmark = pytest.mark.slow

# Long enough that second turns are in the same bucket of widths, and so in the same programs.
PROMPTS = [Prompt(f"p{i}", "even" if i % 2 == 0 else "odd", ("hi" * (i + 56),)) for i in range(3)]
PROMPTS.append(Prompt("two", "odd", ("first turn " * 11, "second turn")))
VOCABULARY = tuple(range(0, 258, 2))


read = jax.jit(hidden_states, static_argnums=0)


def _hidden(target, recorded):
    rows = [sample.tokens for sample in recorded.samples]
    tokens = pad_rows(rows, (len(rows), bucket_width(max(map(len, rows)))))  # few widths, few programs
    states = np.asarray(read(target.config, target.params, tokens))
    return {sample.id: row[: len(sample.tokens)] for sample, row in zip(recorded.samples, states)}


def _replay(target, recorded, draft: DraftConfig, params, depth):
    hidden = _hidden(target, recorded)
    judge = make_judge(target, hidden, recorded, draft, make_mesh(), num_draft_tokens=depth, batch_tokens=256)
    return walk(recorded, judge(params))


@pytest.mark.parametrize(
    "stop, vocabulary", [((257,), ()), ((257, 27, 92), VOCABULARY)], ids=["whole answers", "stops, a draft vocabulary"]
)
def test_greedy_counts_are_the_decoders(stop, vocabulary):
    target = damped_target(stop)
    draft, params = often_right(target, vocabulary)
    mesh = make_mesh()
    options = dict(temperature=0.0, max_new_tokens=24, batch_size=4, seed=0)
    report = evaluate(target, {"draft": Draft(draft, params)}, PROMPTS, mesh, num_draft_tokens=3, **options)["draft"]
    recorded = record(target, PROMPTS, mesh, ahead=4, **options)
    counts = _replay(target, recorded, draft, params, depth=3)
    figures = acceptance_figures(counts, np.ones(len(PROMPTS), bool), seed=0)
    none, *some = report["accept_counts"]
    assert none > 0 and sum(map(bool, some)) >= 2, "a draft that is never right, or always, would prove nothing"
    for name, value in figures.items():
        assert report[name] == value, name
    assert [p["emitted"] for p in report["prompts"]] == counts.emitted.tolist()


def test_sampled_counts_have_the_decoders_law():
    """Over many sampled answers to one prompt, decoding's mean counts and replay's expectations agree."""
    target = damped_target()
    draft, params = often_right(target)
    mesh, depth, longest, rows = make_mesh(), 3, 10, 1500  # 500 miss an acceptance a tenth too low
    prompts = [Prompt(f"p{i}", "same", ("hi",)) for i in range(rows)]
    batch = prompt_batch(first_prompts(target, prompts, longest), range(rows), rows, seed=1)
    decode = make_generate(decode_setup(target, [draft], num_draft_tokens=depth, max_new_tokens=longest), mesh)
    stats = decode(prepare_params(target.params, [params]), batch, 1.0).stats
    recorded = record(target, prompts, mesh, temperature=1.0, max_new_tokens=longest, ahead=depth, batch_size=rows, seed=2)
    counts = _replay(target, recorded, draft, params, depth)
    assert np.asarray(stats.accepted).sum() > 0.1 * np.asarray(stats.reached).sum()
    for drawn, expected in zip(stats, counts, strict=True):
        drawn, expected = np.asarray(drawn, np.float64), np.asarray(expected)
        error = np.sqrt((drawn.var(axis=0) + expected.var(axis=0)) / rows)
        assert np.all(np.abs(drawn.mean(axis=0) - expected.mean(axis=0)) < 5 * error + 1e-9)
        # Given the text nothing is left to chance, so the expectations must vary less.
        assert expected.var(axis=0).sum() < drawn.var(axis=0).sum()


def test_walk_by_hand():
    """Answer of five tokens from position 2, γ = 2: every way to cut it, added up by hand."""
    accept = np.zeros((2, 7))
    accept[0] = [0, 0.5, 0.25, 1.0, 0.5, 0, 0]  # entry t is about token t + 2
    accept[1] = [0, 0, 0.5, 0.5, 0.5, 0, 0]
    histogram, reached, accepted = walk_text(accept, 2, np.zeros(5, bool), max_new_tokens=3)
    # A first step at one token: 1/2 rejects (a second step at two tokens follows), 1/4 accepts one, 1/4 two; both end.
    # The second step: 3/4 rejects at once, 1/8 accepts one, 1/8 two.
    assert np.allclose(histogram, [0.5 + 0.5 * 0.75, 0.25 + 0.5 * 0.125, 0.25 + 0.5 * 0.125])
    assert np.allclose(reached, [1.5, 0.5 + 0.5 * 0.25])
    assert np.allclose(accepted, [0.5 + 0.125, 0.25 + 0.0625])
    stopped = walk_text(accept, 2, np.array([False, True]), max_new_tokens=3)
    assert np.allclose(stopped[0], [0.5, 0.5, 0])
    assert np.allclose(stopped[1], [1, 0])


def test_more_depth_than_recorded_is_refused():
    target = loaded_target()
    draft, _ = often_right(target)
    tokens = np.arange(6, dtype=np.int32)
    recorded = Recorded([Sample("a/0", "s", tokens, tokens > 2)], np.array([0]), 0.0, 3, 2, (257,))
    with pytest.raises(ValueError, match="recorded for up to 2"):
        make_judge(target, {}, recorded, draft, make_mesh(), num_draft_tokens=3)


@pytest.mark.parametrize("rule, temperature", [(None, 0.0), ("merge", 1.0)])
def test_tree_counts_are_the_decoders_at_every_temperature(rule, temperature):
    prompts = PROMPTS[:3]
    target = damped_target((257, 27, 92))
    draft, params = often_right(target)
    shape = TreeShape(3, 3, 8)
    drafts, params, combine = {"one": Draft(draft, params)}, [params], None
    if rule:
        other = jax.tree.map(lambda x, y: 0.8 * x + 0.2 * y, params[0], toy_draft(target.config, seed=7)[1])
        combine = Combine(rule)
        drafts = {"both": Team({"one": Draft(draft, params[0]), "two": Draft(draft, other)}, combine)}
        params.append(other)
    mesh = make_mesh()
    options = dict(temperature=temperature, max_new_tokens=24, batch_size=4, seed=0)
    (report,) = evaluate(target, drafts, prompts, mesh, num_draft_tokens=3, tree=shape, **options).values()
    recorded = record(target, prompts, mesh, ahead=4, **options)
    shapes = [draft] * len(params)
    setup = decode_setup(target, shapes, num_draft_tokens=3, max_new_tokens=24, tree=shape, combine=combine)
    counts, shares = make_tree_replay(target, _hidden(target, recorded), recorded, setup, mesh, batch_size=4)(params)
    assert min(report["accept_counts"][:3]) > 0, "trees that are never right, or always, would prove nothing"
    for name, value in acceptance_figures(counts, np.ones(len(prompts), bool), seed=0).items():
        assert report[name] == value, name
    if rule:
        told = [each["accepted_share"] for each in report["drafts"].values()]
        assert told == (shares.accepted.sum(axis=0) / shares.accepted.sum()).tolist()
