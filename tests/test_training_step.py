"""The compiled step: what its result must not depend on, the schedule, and that it compiles once."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from toy import random_params, toy_config

from jsfdd.base.mesh import make_mesh, replicate, shard_rows
from jsfdd.base.records import DraftBatch
from jsfdd.models.draft import draft_config
from jsfdd.models.target import hidden_states
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.step import (
    Optimizer,
    init_state,
    learning_rate_schedule,
    make_accumulating_step,
    make_optimizer,
    make_train_step,
)

CONFIG = toy_config()
DRAFT = draft_config(CONFIG)
RECIPE = Recipe()
OPTIMIZER = make_optimizer(RECIPE, num_steps=20)


@functools.cache
def target():
    return random_params(CONFIG)


def frozen_on(mesh):
    return replicate(borrow(CONFIG, target()), mesh)


@functools.cache
def compiled_step(devices):
    mesh = make_mesh(data=devices)
    return make_train_step(DRAFT, OPTIMIZER, mesh, RECIPE), mesh


def batch(rows=4, length=12):
    random = np.random.default_rng(0)
    tokens = random.integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)
    counted = random.random((rows, length)) < 0.5
    counted[:, -1] = False
    hidden = jax.jit(hidden_states, static_argnums=0)(CONFIG, target(), tokens)
    return DraftBatch(tokens, counted, counted.astype(np.float32), np.asarray(hidden))


def run(batch, devices=1, steps=2):
    """(params, metrics) after some steps on the same batch."""
    step, mesh = compiled_step(devices)
    state, frozen = replicate(init_state(DRAFT, OPTIMIZER, seed=0), mesh), frozen_on(mesh)
    for _ in range(steps):
        state, metrics = step(frozen, state, shard_rows(batch, mesh))
    return jax.device_get((state.params, metrics))


def assert_close(found, expected, rtol, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def test_four_devices_equal_one():
    params, metrics = run(batch(), devices=1)
    params_of_four, metrics_of_four = run(batch(), devices=4)
    assert_close(metrics_of_four, metrics, rtol=1e-5, atol=1e-6)
    # Adam divides by √v: where a gradient is all but zero, rounding decides its direction. A step is about 5e-5 long.
    assert_close(params_of_four, params, rtol=1e-4, atol=2e-6)


def test_padding_rows_and_columns_change_nothing():
    plain = batch()
    padded = DraftBatch(
        np.pad(plain.tokens, ((0, 4), (0, 5))),
        np.pad(plain.counted, ((0, 4), (0, 5))),
        np.pad(plain.weight, ((0, 4), (0, 5))),
        np.pad(plain.hidden, ((0, 4), (0, 5), (0, 0))),
    )
    (params, metrics), (padded_params, padded_metrics) = run(plain), run(padded)
    assert metrics.sums.counted == padded_metrics.sums.counted > 0
    assert_close(padded_metrics, metrics, rtol=1e-5, atol=1e-6)
    assert_close(padded_params, params, rtol=1e-4, atol=2e-6)


def test_what_fills_the_padding_changes_nothing():
    plain = batch(length=12)
    beyond = np.arange(12) >= 9
    counted = plain.counted & ~beyond[None]
    noisy = plain._replace(
        counted=counted,
        weight=counted.astype(np.float32),
        tokens=np.where(beyond[None] & (np.arange(12) > 9)[None], 7, plain.tokens),
        hidden=np.where((np.arange(12) > 9)[None, :, None], 100.0, plain.hidden).astype(np.float32),
    )
    expected, found = run(plain._replace(counted=counted, weight=counted.astype(np.float32))), run(noisy)
    assert_close(found, expected, rtol=0, atol=0)


def test_step_traces_once_per_shape_and_takes_over_its_state():
    traces = []

    class Counting(Optimizer):
        def update(self, *args):
            traces.append(1)
            return super().update(*args)

    mesh = make_mesh(data=4)
    step = make_train_step(DRAFT, Counting(RECIPE, 20), mesh, RECIPE)
    state, frozen = replicate(init_state(DRAFT, OPTIMIZER, seed=0), mesh), frozen_on(mesh)
    first = state.params["fc"]["kernel"]
    for length in (12, 12, 12, 14, 14, 12):
        state, _ = step(frozen, state, shard_rows(batch(length=length), mesh))
    assert len(traces) == 2
    assert first.is_deleted()
    assert int(state.step) == 6


def test_devices_talk_once_a_step():
    step, mesh = compiled_step(4)
    state, frozen = replicate(init_state(DRAFT, OPTIMIZER, seed=0), mesh), frozen_on(mesh)
    text = step.lower(frozen, state, shard_rows(batch(), mesh)).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert "all-gather" not in text and "all-to-all" not in text


def test_accumulated_batches_are_one_large_batch():
    whole, mesh = batch(rows=8), make_mesh(data=1)
    recipe = dataclasses.replace(RECIPE, hidden_noise=0.0)
    fresh = replicate(init_state(DRAFT, OPTIMIZER, seed=0), mesh)
    one, metrics = make_train_step(DRAFT, OPTIMIZER, mesh, recipe)(frozen_on(mesh), fresh, whole)
    recipe = dataclasses.replace(recipe, accumulate=3)
    step = make_accumulating_step(DRAFT, OPTIMIZER, mesh, recipe)
    parts = [jax.tree.map(lambda x, rows=rows: x[rows], whole) for rows in (slice(0, 4), slice(4, 6), slice(6, 8))]
    fresh = replicate(init_state(DRAFT, OPTIMIZER, seed=0), mesh)
    added, metrics_of_three = step(frozen_on(mesh), fresh, parts)
    assert_close(metrics_of_three, metrics, rtol=1e-5, atol=1e-6)
    assert_close(added.params, one.params, rtol=1e-4, atol=2e-6)
    assert int(added.step) == 1


def test_noise_changes_from_step_to_step_and_can_be_switched_off():
    mesh = make_mesh(data=1)
    for noise, number_of_losses in ((0.0, 1), (0.2, 3)):
        recipe = Recipe(hidden_noise=noise, learning_rate=1e-30)
        step = make_train_step(DRAFT, OPTIMIZER, mesh, recipe)
        state, losses = replicate(init_state(DRAFT, OPTIMIZER, seed=0), mesh), set()
        for _ in range(3):  # the same parameters each time: only the noise can differ
            fresh = replicate(init_state(DRAFT, OPTIMIZER, seed=0), mesh)._replace(step=state.step)
            state, metrics = step(frozen_on(mesh), fresh, batch())
            losses.add(float(metrics.sums.total))
        assert len(losses) == number_of_losses


def test_schedule_is_scaled_to_the_run():
    recipe = Recipe(learning_rate=1.0, warmup_share=0.1)
    for steps in (100, 1000):
        rate = np.array([float(learning_rate_schedule(recipe, steps)(step)) for step in range(steps)])
        warmup = steps // 10
        assert rate.argmax() == warmup and rate[warmup] == 1.0
        assert 0 < rate[0] < 2 / warmup and np.all(np.diff(rate[: warmup + 1]) > 0)
        assert rate[-1] == pytest.approx(0.1) and np.all(np.diff(rate[warmup:]) < 0)
    for steps in (1, 2, 3):  # a run of a few steps is a run as well
        rate = learning_rate_schedule(recipe, steps)
        assert all(0.09 < float(rate(step)) <= 1 for step in range(steps))


def test_runs_of_other_lengths_share_a_program_and_keep_their_rates():
    """Beside optax's AdamW with its own schedules, on made-up gradients."""
    recipe = Recipe(warmup_share=0.2, learning_rate=1e-2)
    mesh = make_mesh(data=1)
    short, long = (make_train_step(DRAFT, make_optimizer(recipe, steps), mesh, recipe) for steps in (10, 25))
    assert short is long
    random, update = np.random.default_rng(0), jax.jit(make_optimizer(recipe, 1).update)
    for steps in (10, 25):
        warmup, peak = round(0.2 * steps), 1e-2
        rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
        fall = optax.linear_schedule(peak, peak / 10, steps - 1 - warmup)
        twin = optax.chain(
            optax.clip_by_global_norm(recipe.max_grad_norm),
            optax.adamw(optax.join_schedules([rise, fall], [warmup]), b1=0.9, b2=0.95, weight_decay=0.0),
        )
        params = expected = {"w": np.ones(3, np.float32)}
        state, twin_state = make_optimizer(recipe, steps).init(params), twin.init(params)
        for _ in range(steps + 2):
            gradient = {"w": random.normal(size=3).astype(np.float32)}
            change, state = update(gradient, state, params)
            change_of_twin, twin_state = twin.update(gradient, twin_state, expected)
            params, expected = optax.apply_updates(params, change), optax.apply_updates(expected, change_of_twin)
            np.testing.assert_allclose(params["w"], expected["w"], rtol=2e-6)
