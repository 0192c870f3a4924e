"""Where hidden states come from: a pass of its own, the scoring pass that keeps what can be selected, or each training step."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from toy import as_target, random_params, toy_config

from jsfdd.base.mesh import make_mesh, shard_rows
from jsfdd.base.records import Sample
from jsfdd.data.batches import Shape, choose_shapes, make_batches, pad_batch
from jsfdd.hidden import writer as writer_module
from jsfdd.hidden.best_k import StillPossible
from jsfdd.hidden.capture import keep_hidden, make_recompute, store_hidden
from jsfdd.hidden.rows import row_bytes
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.foreign import foreign_target
from jsfdd.models.target import hidden_states
from jsfdd.scoring.metrics import column_names
from jsfdd.scoring.passes import group_plans, spread_out
from jsfdd.scoring.score import score_samples
from jsfdd.scoring.table import ScoreTable, join
from jsfdd.selection.sfdd import select

CONFIG = toy_config(vocab_size=97, hidden_size=16, num_layers=1)
PARAMS = random_params(CONFIG)
TARGET = as_target(CONFIG, PARAMS)
IDENTITY = {"target": {"fingerprint": "aa"}, "lengths": (1, 2)}


def make_samples():
    random = np.random.default_rng(0)
    samples = []
    for i in range(12):
        tokens = random.integers(0, CONFIG.vocab_size, int(random.integers(3, 120))).astype(np.int32)
        samples.append(Sample(f"s{i}", "x", tokens, np.ones(len(tokens), bool)))
    return samples


@jax.jit
def forward(tokens):
    return hidden_states(CONFIG, PARAMS, tokens)


def hidden_alone(tokens):
    return np.asarray(forward(np.pad(tokens, (0, 128 - len(tokens)))[None, :]))[0, : len(tokens)]


@pytest.mark.parametrize("devices", [1, 4])
def test_store_hidden_stores_the_targets_hidden_states_and_computes_only_what_is_missing(tmp_path, monkeypatch, devices):
    samples, mesh = make_samples(), make_mesh(data=devices)
    options = dict(batch_tokens=256, directory=tmp_path, identity=IDENTITY, shard_bytes=4000, progress=False)
    first = store_hidden(TARGET, samples, mesh, dtype="float32", **options)
    assert set(first) == {sample.id for sample in samples}
    for sample in samples:
        np.testing.assert_allclose(first[sample.id], hidden_alone(sample.tokens), rtol=1e-4, atol=1e-5)
    before = {name: np.array(first[name]) for name in first}
    lost = json.loads((tmp_path / "manifest.json").read_text())["shards"][1]
    (tmp_path / lost["file"]).unlink()
    batches = []
    original = writer_module.run_batches

    def counting(step, params, samples, plans, mesh, **rest):
        batches.append(len(plans))
        return original(step, params, samples, plans, mesh, **rest)

    monkeypatch.setattr(writer_module, "run_batches", counting)
    again = store_hidden(TARGET, samples, mesh, dtype="float32", **options)
    for name in before:
        np.testing.assert_array_equal(again[name], before[name])
    store_hidden(TARGET, samples, mesh, dtype="float32", **options)
    assert batches[0] > 0 and batches[1] == 0


def test_store_hidden_in_bfloat16_rounds_once(tmp_path):
    samples, mesh = make_samples()[:3], make_mesh(data=1)
    options = dict(batch_tokens=256, identity=IDENTITY, progress=False)
    exact = store_hidden(TARGET, samples, mesh, directory=tmp_path / "a", dtype="float32", **options)
    rounded = store_hidden(TARGET, samples, mesh, directory=tmp_path / "b", dtype="bfloat16", **options)
    for name in exact:
        np.testing.assert_array_equal(rounded[name], np.asarray(exact[name]).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("devices", [1, 4])
def test_recomputed_hidden_states_are_the_stored_ones(tmp_path, devices):
    """On one device to the bit, in batches of the store's own shapes; over several but for rounding."""
    samples, mesh = make_samples(), make_mesh(data=devices)
    store = store_hidden(
        TARGET, samples, make_mesh(data=1), batch_tokens=512, directory=tmp_path, identity=IDENTITY, progress=False
    )
    hidden_of = make_recompute(TARGET, mesh, "bfloat16")
    lengths = [len(sample.tokens) for sample in samples]
    for plan in make_batches(lengths, choose_shapes(lengths, 512)):
        own = [samples[i] for i in plan.indices]
        batch = pad_batch(own, plan.shape._replace(rows=plan.shape.rows + -plan.shape.rows % devices))
        hidden = hidden_of(shard_rows(batch, mesh))
        assert hidden.dtype == jnp.bfloat16
        for sample, row in zip(own, np.asarray(hidden)):
            found, expected = row[: len(sample.tokens)].astype(np.float32), store[sample.id].astype(np.float32)
            np.testing.assert_allclose(found, expected, rtol=0.0 if devices == 1 else 0.01, atol=0.0 if devices == 1 else 1e-4)


# --- Disk, at any moment ---------------------------------------------------------------------------------------------

MANY = 500


def many_samples():
    """Chats of log-normal lengths, a few of which have no counted token."""
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(4.5, 0.8, MANY).astype(int) + 8, 1024)
    samples = []
    for i, length in enumerate(lengths):
        mask = np.zeros(length, bool)
        mask[length // 2 if i % 11 else -1 :] = True
        samples.append(Sample(f"m{i}", "x", np.zeros(length, np.int32), mask))
    return samples


def hidden_of(sample):
    random = np.random.default_rng(int(sample.id[1:]))
    return random.normal(size=(len(sample.tokens), CONFIG.hidden_size)).astype(np.float32)


def size_of(samples, names=None, dtype="bfloat16"):
    tokens = sum(len(sample.tokens) for sample in samples if names is None or sample.id in names)
    return tokens * row_bytes(dtype, CONFIG.hidden_size)


def in_order(samples, order):
    """The samples' batches, `order` of those that `make_batches` makes."""
    lengths = [len(sample.tokens) for sample in samples]
    for plan in order(make_batches(lengths, choose_shapes(lengths, 1024))):
        yield [samples[i] for i in plan.indices]


def keep_all(
    directory, samples, scores, metrics, retain_ratio, held_out, monkeypatch, order=lambda plans: spread_out(plans, 1)
):
    """(table, most bytes that the store took at any moment), of a scoring pass with these scores."""
    counts = np.array([sample.counted.sum() for sample in samples], np.int32)
    values = np.where(counts > 0, scores, np.nan)
    ids = tuple(sample.id for sample in samples)
    table = ScoreTable(ids, ids, counts, dict.fromkeys(column_names(), values), identity={})
    most, unlink = 0, type(directory).unlink

    def look():
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in directory.iterdir() if path.suffix != ".json"))

    def look_and_unlink(path, **rest):  # disk is at its highest just before a file goes
        look()
        unlink(path, **rest)

    stays = StillPossible(samples, metrics, retain_ratio, 0, held_out)
    with monkeypatch.context() as patch:
        patch.setattr(type(directory), "unlink", look_and_unlink)
        with keep_hidden(TARGET, stays, directory=directory, identity=IDENTITY, kept_for={}) as keeper:
            for batch in in_order(samples, order):
                hidden = np.zeros((len(batch), max(len(sample.tokens) for sample in batch), CONFIG.hidden_size), np.float32)
                for row, sample in zip(hidden, batch):
                    row[: len(sample.tokens)] = hidden_of(sample)
                keeper.keep(batch, join([table], [sample.id for sample in batch]), hidden)
                look()
        look()
    return table, most


@pytest.mark.parametrize("retain_ratio", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["by chance", "short ones", "a trend"])
def test_disk_never_exceeds_a_fifth_more_than_the_share_that_is_kept(tmp_path, monkeypatch, retain_ratio, kind):
    samples, random = many_samples(), np.random.default_rng(1)
    lengths = np.array([len(sample.tokens) for sample in samples])
    scores = {
        "by chance": random.random(MANY),
        "short ones": -lengths + random.random(MANY),
        "a trend": random.random(MANY) - 0.0002 * lengths,
    }[kind]
    held_out = {sample.id for sample in samples[::20]}
    table, most = keep_all(tmp_path, samples, scores, ["flatness"], retain_ratio, held_out, monkeypatch)
    ranked = [sample for sample in samples if sample.counted.any()]
    assert most <= 1.2 * retain_ratio * size_of(ranked) + size_of(samples, held_out)
    store = HiddenStore.open(tmp_path, IDENTITY, verify=True)
    assert set(store) == {*select(table, retain_ratio).ids, *held_out}
    for sample in samples:
        if sample.id in store:
            np.testing.assert_array_equal(store[sample.id], hidden_of(sample).astype(ml_dtypes.bfloat16))


def test_longest_first_would_break_the_bound(tmp_path, monkeypatch):
    samples = many_samples()
    scores = np.random.default_rng(1).random(MANY)
    _, most = keep_all(tmp_path, samples, scores, ["flatness"], 0.3, (), monkeypatch, order=lambda plans: plans)
    assert most > 1.2 * 0.3 * size_of(samples)


def test_where_long_samples_are_selected_disk_is_what_they_need(tmp_path, monkeypatch):
    """No order helps against a selection that is itself larger than its share; nothing else is then stored for long."""
    samples = many_samples()
    scores = np.array([len(sample.tokens) for sample in samples]) + np.random.default_rng(1).random(MANY)
    table, most = keep_all(tmp_path, samples, scores, ["flatness"], 0.3, (), monkeypatch)
    assert most <= 1.2 * size_of(samples, select(table, 0.3).ids)


def test_what_is_known_beforehand_is_never_dropped(tmp_path, monkeypatch):
    samples = many_samples()
    table, most = keep_all(tmp_path, samples, np.zeros(MANY), ["random"], 0.3, (), monkeypatch)
    chosen = select(table, 0.3, metric="random").ids
    assert set(HiddenStore.open(tmp_path, IDENTITY)) == set(chosen) and most == size_of(samples, chosen)


@pytest.mark.parametrize("size", [1, 4])
def test_spread_out_mixes_all_lengths_and_keeps_the_longest_first(size):
    samples = many_samples()
    lengths = [len(sample.tokens) for sample in samples]
    plans = make_batches(lengths, choose_shapes(lengths, 1024))
    order = spread_out(plans, size)
    assert sorted(order) == sorted(plans) and order[0] == plans[0]
    assert len(list(group_plans(order, size))) <= len(list(group_plans(plans, size)))
    done = np.cumsum([len(plan.indices) for plan in order]) / MANY
    tokens = np.cumsum([sum(lengths[i] for i in plan.indices) for plan in order]) / sum(lengths)
    assert np.abs(done - tokens).max() < 3 * size / len(order)  # some groups' worth


# --- Streams in front of the final state -----------------------------------------------------------------------------

DEEP = toy_config(vocab_size=97, hidden_size=16, num_layers=4)
DEEP_TARGET = as_target(DEEP, random_params(DEEP))
LAYERS = (0, 2, 3)


@functools.partial(jax.jit, static_argnums=1)
def read_deep(tokens, layers):
    return hidden_states(DEEP, DEEP_TARGET.params, tokens, layers)


def deep_states(sample, layers=LAYERS):
    return np.asarray(read_deep(np.pad(sample.tokens, (0, 128 - len(sample.tokens)))[None], layers))[0, : len(sample.tokens)]


@pytest.mark.parametrize("foreign", [False, True])
def test_one_pass_scores_and_keeps_the_streams(tmp_path, foreign):
    samples, mesh = make_samples()[:5], make_mesh(data=1)
    target = DEEP_TARGET
    if foreign:
        embedding, head = DEEP_TARGET.params["embed"]["embedding"], DEEP_TARGET.params["head"]["kernel"].T
        read = jax.jit(lambda tokens: hidden_states(DEEP, DEEP_TARGET.params, tokens, LAYERS))
        target = foreign_target(read, embedding, head, DEEP, name="mine")
    options = dict(batch_tokens=256, progress=False)
    alone = score_samples(target, samples, mesh, **options)
    everything = StillPossible(samples, [], 1.0, 0, {sample.id for sample in samples})
    with keep_hidden(
        target, everything, directory=tmp_path, identity=IDENTITY, kept_for={}, dtype="float32", layers=LAYERS
    ) as keeper:
        table = score_samples(target, samples, mesh, keeper=keeper, **options)
    np.testing.assert_allclose(table["flatness"], alone["flatness"], rtol=1e-6)
    store = HiddenStore.open(tmp_path, IDENTITY, verify=True)
    assert store.layers == LAYERS and set(store) == {sample.id for sample in samples}
    for sample in samples:
        np.testing.assert_allclose(store[sample.id], deep_states(sample), rtol=1e-4, atol=1e-5)
    again = score_samples(target, samples, mesh, hidden=store, **options)  # the last part is what the head reads
    np.testing.assert_allclose(again["flatness"], table["flatness"], rtol=1e-5)
    if foreign:
        with pytest.raises(ValueError, match=r"mine: hidden_states gave .* the inputs of layers \[0, 1\]"):
            make_recompute(target, mesh, "float32", (0, 1))(shard_rows(pad_batch(samples[:1], Shape(1, 128)), mesh))


def test_each_part_has_its_own_scale(tmp_path):
    samples, mesh = make_samples()[:3], make_mesh(data=1)
    options = dict(batch_tokens=256, identity=IDENTITY, progress=False, dtype="int8")
    store = store_hidden(DEEP_TARGET, samples, mesh, directory=tmp_path, layers=LAYERS, **options)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) == sum(len(s.tokens) for s in samples) * 4 * (16 + 4)
    for sample in samples:
        true = deep_states(sample).reshape(-1, 4, 16)
        error = np.abs(store[sample.id].reshape(-1, 4, 16) - true).max(axis=2)
        assert np.all(error <= np.abs(true).max(axis=2) / 127)
    for layers in ((0, 1, 3), ()):
        with pytest.raises(ValueError, match=r"layers: found \[0, 2, 3\]|hidden_size: found 64"):
            store_hidden(DEEP_TARGET, samples, mesh, directory=tmp_path, layers=layers, **options)
