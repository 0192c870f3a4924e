"""Training an EAGLE-3 draft: the loss and its gradient against numpy in float64, the rows that learn, and whole runs."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from eagle3_twin import slow_steps
from toy import as_target, random_params, toy_config

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import DraftBatch, Sample
from jsfdd.hidden.capture import store_hidden
from jsfdd.models.draft import Draft, draft_config, init_draft
from jsfdd.models.target import embed_tokens, hidden_states, init_params
from jsfdd.selection.vocabulary import covering_tokens
from jsfdd.training.batch import TrainingData
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.loss import borrow, loss_sums, restrict
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_means import make_means_step
from jsfdd.training.soft_store import store_soft_targets
from jsfdd.training.soft_top_k import make_top_k_step
from jsfdd.training.token_loss import Distance
from jsfdd.training.train import train
from jsfdd.weights.checkpoint import read_trained_draft

CONFIG = toy_config(vocab_size=37, num_layers=4)
LAYERS = (0, 2, 3)
MESH = make_mesh(data=1)
RECIPE = Recipe(draft_kind="eagle3", target_layers=LAYERS, draft_steps=3, step_decay=0.7)
VOCABULARY = tuple(range(0, 37, 2))


@functools.cache
def toy(vocabulary):
    """(target params, draft config, draft params, batch): its head begins as the target's and has moved a little."""
    params = random_params(CONFIG)
    draft = draft_config(CONFIG, vocabulary=vocabulary, kind="eagle3", target_layers=LAYERS)
    random = np.random.default_rng(0)
    draft_params = jax.jit(init_draft, static_argnums=0)(draft, jax.random.key(1), np.asarray(params["head"]["kernel"]).T)
    draft_params = jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape, np.float32), jax.device_get(draft_params))
    tokens = random.integers(0, CONFIG.vocab_size, (2, 9)).astype(np.int32)
    counted = np.zeros((2, 9), bool)
    counted[0, 3:8] = True
    counted[1, [1, 2, 3, 6, 7]] = True
    hidden = jax.jit(hidden_states, static_argnums=(0, 3))(CONFIG, params, tokens, LAYERS)
    return params, draft, draft_params, DraftBatch(tokens, counted, counted.astype(np.float32), hidden)


def slow_loss(draft_params, vocabulary=(), steps=3, decay=0.7, beyond="weigh"):
    """Σ_i decay^i Σ_rows −Σ_v p_v log q_v in EAGLE-3's indexing, where a row counts while its token is one to be verified."""
    params, draft, _, batch = toy(vocabulary)
    head = np.asarray(params["head"]["kernel"], np.float64)
    rows = np.asarray(draft_params["head"]["rows"], np.float64)
    tokens = np.array(vocabulary) if vocabulary else np.arange(CONFIG.vocab_size)
    embedding, hidden = np.asarray(embed_tokens(CONFIG, params, batch.tokens)), np.asarray(batch.hidden)
    total = 0.0
    for b in range(2):
        p = scipy.special.softmax(hidden[b, :, -32:].astype(np.float64) @ head, axis=1)
        for i, outputs in enumerate(slow_steps(draft, draft_params, embedding[b, 1:], hidden[b, :-1], steps)):
            for t, output in enumerate(outputs):
                # Row t of step i reads x_{t+1+i} and proposes x_{t+2+i}, of which position t+1+i has the score.
                if not all(batch.counted[b, t + 1 : t + 2 + i]):
                    continue
                target = p[t + 1 + i]
                within = target[tokens]
                if beyond != "weigh":
                    within = within / within.sum() * (beyond == "keep" or np.argmax(target) in tokens)
                total -= decay**i * np.sum(within * scipy.special.log_softmax(rows @ output))
    return total


def fast_loss(draft_params, batch, recipe=RECIPE, vocabulary=()):
    params, draft, *_ = toy(vocabulary)
    borrowed = borrow(CONFIG, params)
    return loss_sums(draft_params, borrowed, batch, None, draft=draft, recipe=recipe, block=4)


@pytest.mark.parametrize("known", ["all of p", "top k, draft vocabulary", "means"])
def test_loss_and_gradient_are_the_twins(known):
    vocabulary = VOCABULARY if "vocabulary" in known else ()
    params, draft, draft_params, batch = toy(vocabulary)
    recipe = RECIPE
    if "top k" in known:
        size = len(vocabulary) or 37
        recipe = dataclasses.replace(RECIPE, soft_targets="top_k", soft_top_k=size)
        step = make_top_k_step(size, MESH, 4, vocabulary)
        batch = batch._replace(soft_targets=step(borrow(CONFIG, params), batch))
    if known == "means":  # exact while the head stays the target's
        recipe = dataclasses.replace(RECIPE, soft_targets="means", draft_head="frozen")
        draft_params = draft_params | {"head": {"rows": params["head"]["kernel"].T}}
        step = make_means_step(Distance(), MESH, 4, "float32")
        batch = batch._replace(soft_targets=step(borrow(CONFIG, params), batch))
    total, gradient = jax.jit(jax.value_and_grad(lambda p: fast_loss(p, batch, recipe, vocabulary).total))(draft_params)
    assert float(total) == pytest.approx(slow_loss(draft_params, vocabulary), rel=2e-3 if "top k" in known else 1e-5)

    random = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: random.standard_normal(x.shape), draft_params)
    if known == "means":
        direction["head"]["rows"] = np.zeros_like(direction["head"]["rows"])
        assert not np.any(gradient["head"]["rows"])
    whole = jax.tree.map(lambda x: np.asarray(x, np.float64), draft_params)

    def moved(step):
        return slow_loss(jax.tree.map(lambda x, d: x + step * d, whole, direction), vocabulary)

    slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
    found = sum(float(np.vdot(g, d)) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert found == pytest.approx(slope, rel=5e-3 if "top k" in known else 1e-3)


def test_the_rows_that_learn_are_those_that_decoding_verifies(monkeypatch):
    """By gradient. With no attention a row reads its own streams alone: what moves them is what it is supervised by.

    The answer is x_3 … x_8; x_3 is the target's own, so x_4 is the first that is ever drafted, by the row that reads h_2.
    """
    params, draft, draft_params, batch = toy(())
    draft_params = draft_params | {"layer": dict(draft_params["layer"])}
    attention = dict(draft_params["layer"]["attention"])
    attention["o_proj"] = jax.tree.map(jnp.zeros_like, attention["o_proj"])
    draft_params["layer"]["attention"] = attention
    batch = jax.tree.map(lambda x: x[:1], batch)

    def of_step(hidden, number):
        monkeypatch.setattr(Recipe, "step_weights", tuple(float(number == n) for n in range(3)))
        return fast_loss(draft_params, batch._replace(hidden=hidden)).total

    by_streams = jax.jit(jax.grad(of_step), static_argnums=1)
    for number, rows in enumerate(([2, 3, 4, 5, 6], [2, 3, 4, 5], [2, 3, 4])):  # the last token that counts is x_8
        slope = np.asarray(by_streams(batch.hidden, number))[0]
        assert np.flatnonzero(np.abs(slope[:, :-32]).max(axis=1)).tolist() == rows, number
        assert not np.any(slope[:, -32:]), "the draft reads no final state, and the target is frozen"


@pytest.mark.parametrize("beyond", ["weigh", "keep", "drop"])
@pytest.mark.parametrize("kind", ["means", "top_k"])
def test_what_lies_beyond_the_vocabulary(beyond, kind):
    params, draft, draft_params, batch = toy(VOCABULARY)
    borrowed = borrow(CONFIG, params)
    if kind == "means":
        draft_params = draft_params | {"head": {"rows": borrowed.output[np.array(VOCABULARY)]}}
        step = make_means_step(Distance(), MESH, 4, "float32", VOCABULARY, beyond)
        recipe = dataclasses.replace(RECIPE, soft_targets="means", draft_head="frozen")
    else:
        step = make_top_k_step(len(VOCABULARY), MESH, 4, VOCABULARY, beyond)
        recipe = dataclasses.replace(RECIPE, soft_targets="top_k", soft_top_k=len(VOCABULARY))
    batch = batch._replace(soft_targets=step(borrowed, batch))
    total = jax.jit(lambda p: fast_loss(p, batch, recipe, VOCABULARY).total)(draft_params)
    others = {other: slow_loss(draft_params, VOCABULARY, beyond=other) for other in ("weigh", "keep", "drop")}
    assert float(total) == pytest.approx(others[beyond], rel=2e-3)
    assert min(abs(a - b) / a for a, b in itertools.combinations(others.values(), 2)) > 0.02


# --- Whole runs ------------------------------------------------------------------------------------------------------


def samples(count=10):
    random = np.random.default_rng(1)
    made = []
    for i in range(count):
        start = random.integers(0, 37)
        tokens = ((start + 3 * np.arange(12)) % 37).astype(np.int32)  # what comes next can be learned
        made.append(Sample(f"s{i}", "x", tokens, np.arange(12) >= 2))
    return made


def target():
    return as_target(CONFIG, toy(())[0])


def run(directory, recipe, **changes):
    kept = samples()
    options = {"identity": {"target": "toy"}, "progress": False}
    hidden = store_hidden(target(), kept, MESH, directory=directory / "hidden", layers=LAYERS, **options)
    data = TrainingData(kept, hidden)
    draft = draft_of(CONFIG, recipe, kept, changes["init"].config if "init" in changes else None)
    if kind := recipe.stored_soft_targets(hidden_is_stored=True):
        stored = store_soft_targets(
            kind, data, borrow(CONFIG, target().params), draft, recipe, MESH, directory=directory / kind, **options
        )
        data = data._replace(soft_targets=stored)
    return train(
        target(), data, TrainingData(kept[:2], hidden), recipe, MESH, out=directory / "run", batch_tokens=64,
        progress=False, **changes,
    )  # fmt: skip


SHORT = Recipe(
    draft_kind="eagle3", target_layers=LAYERS, epochs=5, draft_steps=2, held_out_share=0.2, draft_vocab=0.9, soft_top_k=8,
    learning_rate=3e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """(result, directory) of a run with SHORT."""
    directory = tmp_path_factory.mktemp("learned")
    return run(directory, SHORT), directory


@pytest.mark.slow
def test_a_run_learns_and_its_head_begins_as_the_targets_rows(learned, tmp_path):
    result, directory = learned
    vocabulary = np.array(result.draft.config.vocabulary)
    assert 8 <= len(vocabulary) < 37 and result.draft.config.target_layers == LAYERS
    rows = target().params["head"]["kernel"].T[vocabulary]
    moved = np.abs(result.draft.params["head"]["rows"] - rows).max()
    assert 0 < moved < 0.5
    assert result.held_out.keys() >= {"loss", "token_loss", "agreement", "coverage"} and "hidden_loss" not in result.held_out
    frozen = run(tmp_path / "b", dataclasses.replace(SHORT, draft_head="frozen", epochs=1))
    np.testing.assert_array_equal(frozen.draft.params["head"]["rows"], rows)
    loaded = read_trained_draft(directory / "run")
    assert loaded.config == result.draft.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, result.draft.params)


@pytest.mark.slow
def test_a_run_starts_from_another_runs_draft(learned, tmp_path):
    first, _ = learned
    still = dataclasses.replace(SHORT, epochs=1, learning_rate=1e-9, draft_vocab=0)
    again = run(tmp_path / "again", still, init=first.draft)
    assert again.draft.config == first.draft.config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), again.draft.params, first.draft.params)
    with pytest.raises(ValueError, match="init"):
        run(tmp_path / "again", still, init=Draft(first.draft.config, jax.tree.map(lambda x: 2 * x, first.draft.params)))
    for changes, match in [
        (dict(draft_kind="eagle", target_layers=()), "--draft-kind: 'eagle' is asked for, and .* has 'eagle3'"),
        (dict(draft_vocab=9), "--draft-vocab: 9 is asked for"),
        (dict(target_layers=(0, 1)), "target_layers"),
        (dict(eagle3_norms=("fc_norm",)), "eagle3_norms"),
    ]:
        with pytest.raises(ValueError, match=match):
            draft_of(CONFIG, dataclasses.replace(still, **changes), samples(), first.draft.config)


@pytest.mark.slow
def test_a_run_stops_when_its_patience_ends_and_stays_stopped(tmp_path):
    taus = iter([1.2, 1.5, 1.4, 1.5, 1.3, 9.0, 9.0, 9.0])
    asked = []

    def probe(params):
        asked.append(next(taus))
        return {"tau": asked[-1]}

    first = run(tmp_path / "a", SHORT, probe=probe, probe_every=2, patience=3)
    assert asked == [1.2, 1.5, 1.4, 1.5, 1.3] and first.steps == 10
    best = read_trained_draft(tmp_path / "a" / "run")
    assert np.any(best.params["norm"]["scale"] != first.draft.params["norm"]["scale"])
    again = run(tmp_path / "a", SHORT, probe=probe, probe_every=2, patience=3)
    assert len(asked) == 5 and again.steps == 10
    jax.tree.map(np.testing.assert_array_equal, again.draft.params, first.draft.params)
    with pytest.raises(ValueError, match="no probe"):
        run(tmp_path / "b", SHORT, patience=3)


def test_a_vocabulary_covers_the_share_that_is_asked():
    tokens = np.array([9, 9, 5, 5, 5, 5, 7, 7, 7, 3, 9], np.int32)
    sample = Sample("a", "s", tokens, np.array([False, True] + [True] * 8 + [False]))
    # To be proposed: x_2 … x_9 are 5 5 5 5 7 7 7 3.
    assert covering_tokens([sample], 0.5, 12) == (5,)
    assert covering_tokens([sample], 0.6, 12) == (5, 7)
    assert covering_tokens([sample], 0.999, 12) == (3, 5, 7)


def test_what_no_run_can_be_is_named(tmp_path):
    for changes, match in [
        (dict(soft_targets="means"), "head learns: take top_k"),
        (dict(draft_kind="eagle"), "target_layers.*EAGLE-3"),
        (dict(draft_steps=9), "--draft-steps: got 9"),
        (dict(draft_vocab=1.5), "--draft-vocab: got 1.5"),
    ]:
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(RECIPE, **changes)
    assert Recipe(draft_kind="eagle3").unrolled == 3 and Recipe().unrolled == 1
    assert Recipe().step_weights == (1.0,) and Recipe(draft_steps=2).step_weights == (1.0, 1.0)
    final_only = store_hidden(target(), samples(), MESH, directory=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"width 32: an EAGLE-3 draft reads the inputs of the target's layers \[0, 2, 3\]"):
        train(
            target(), TrainingData(samples(), final_only), TrainingData([], {}), RECIPE, MESH, out=tmp_path / "x",
            progress=False,
        )  # fmt: skip


def test_restricting_leaves_a_draft_with_its_own_head_the_whole_target():
    params, draft, *_ = toy(VOCABULARY)
    assert restrict(borrow(CONFIG, params), draft).output.shape == (37, 32)


def test_more_steps_keep_no_more_gradients_of_the_head():
    """Every step has its part of the head's gradient, as large as the head: added up at once, they are one array."""
    config = toy_config(vocab_size=8192, num_layers=4)
    draft = draft_config(config, kind="eagle3", target_layers=LAYERS)
    params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    draft_params = jax.eval_shape(functools.partial(init_draft, draft), jax.random.key(0))

    def temporaries(steps):
        recipe = dataclasses.replace(RECIPE, draft_steps=steps)
        total = lambda *arguments: loss_sums(*arguments, None, draft=draft, recipe=recipe, block=4).total  # noqa: E731
        step = jax.jit(jax.grad(total)).lower(
            draft_params, jax.eval_shape(functools.partial(borrow, config), params), toy(())[3]
        )
        return step.compile().memory_analysis().temp_size_in_bytes

    head = draft_params["head"]["rows"]
    assert temporaries(5) - temporaries(2) < 0.5 * head.size * head.dtype.itemsize
