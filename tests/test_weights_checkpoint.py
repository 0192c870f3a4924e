"""Checkpoints: what is saved comes back, damage is refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import toy_config, toy_draft

from jsfdd.base.files import decode
from jsfdd.base.mesh import make_mesh, replicate
from jsfdd.base.records import TrainState
from jsfdd.models.architecture import Rope
from jsfdd.models.draft import DraftConfig, draft_config
from jsfdd.weights import checkpoint

IDENTITY = {"target": "toy", "options": {"seed": 0, "shapes": [[4, 64]]}}


@pytest.fixture(scope="module")
def state():
    draft, params = toy_draft(toy_config())
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(1e-3, 1e-4, 10)))
    return draft, TrainState(params, optimizer.init(params), jnp.int32(0), jax.random.key(7))


def save_steps(run, state, *steps):
    draft, state = state
    with checkpoint.Checkpoints(run, draft, IDENTITY) as checkpoints:
        for step in steps:
            params = jax.tree.map(lambda x, step=step: x + step, state.params)
            checkpoints.save(state._replace(step=jnp.int32(step), params=params))


def restore(run, like):
    with checkpoint.Checkpoints(run, draft_config(toy_config()), IDENTITY) as checkpoints:
        return checkpoints.resume(like)


def test_restored_state_is_the_saved_one(state, tmp_path):
    save_steps(tmp_path, state, 3, 6, 9)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "9"]  # the last two are kept
    like = replicate(jax.tree.map(jnp.zeros_like, state[1]._replace(key=jax.random.key(0))), make_mesh())
    found = restore(tmp_path, like)
    assert jax.tree.structure(found) == jax.tree.structure(state[1])
    assert int(found.step) == 9
    np.testing.assert_array_equal(jax.random.key_data(found.key), jax.random.key_data(state[1].key))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 9), found.params, state[1].params)
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(like)))


def test_no_checkpoint_yet(state, tmp_path):
    assert restore(tmp_path, state[1]) is state[1]


def test_another_run_is_not_continued(state, tmp_path):
    save_steps(tmp_path, state, 3)
    with checkpoint.Checkpoints(tmp_path, state[0], IDENTITY | {"target": "other"}) as checkpoints:
        with pytest.raises(ValueError, match="other inputs or options.*target: found 'toy', expected 'other'"):
            checkpoints.resume(state[1])


def test_what_a_killed_save_left_is_not_taken_and_removed(state, tmp_path):
    save_steps(tmp_path, state, 3)
    left = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", left)
    assert checkpoint.read_trained_draft(tmp_path).params["fc"]["kernel"].shape == (64, 32)
    assert left.exists(), "reading a run that may still be in training removes nothing"
    with checkpoint.Checkpoints(tmp_path, state[0], IDENTITY) as checkpoints:
        assert checkpoints.latest_step == 3
    assert not left.exists()


@pytest.mark.parametrize("damage", ["data", "item", "empty"])
def test_damaged_checkpoint_names_itself_and_the_remedy(state, tmp_path, damage):
    save_steps(tmp_path, state, 3)
    where = tmp_path / "checkpoints" / "3"
    if damage == "data":
        for path in (where / "params" / "d").iterdir():
            path.write_bytes(path.read_bytes()[:10])
    elif damage == "item":
        shutil.rmtree(where / "params")
    else:
        shutil.rmtree(where)
        where.mkdir()
    for read in (lambda: restore(tmp_path, state[1]), lambda: checkpoint.read_trained_draft(tmp_path)):
        with pytest.raises(ValueError, match="damaged checkpoint.*; delete it") as error:
            read()
        assert str(where) in str(error.value)


def test_read_trained_draft_takes_the_run_or_its_checkpoints(state, tmp_path):
    save_steps(tmp_path, state, 3, 4)
    for path in (tmp_path, str(tmp_path / "checkpoints")):
        config, params, info = checkpoint.read_trained_draft(path)
        assert config == state[0] and info == IDENTITY
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 4), params, state[1].params)
        # On the first device, but not bound to it: decoding spreads them over all.
        assert all(x.sharding.device_set == {jax.devices()[0]} and not x.committed for x in jax.tree.leaves(params))


def test_read_trained_draft_says_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        checkpoint.read_trained_draft(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint in it"):
        checkpoint.read_trained_draft(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_draft_config_survives_json():
    rope = Rope(5e5, kind="yarn", factor=4.0, attention_factor=0.9, frequency_divisors=(1.0, 1.1, 2.5, 8.0))
    config = draft_config(toy_config(rope=rope, sliding_window=8, sliding_layers=(True, False)), fc_bias=True)
    values = json.loads(json.dumps(checkpoint.draft_to_json(config)))
    assert decode(DraftConfig, values, Path("info")) == config
    sliding = dataclasses.replace(config.decoder, sliding_layers=(True,), sliding_window=4, local_rope=Rope(1e4))
    config = dataclasses.replace(config, decoder=sliding)
    assert decode(DraftConfig, checkpoint.draft_to_json(config), Path("info")) == config
    for broken in (
        {**values, "layers": 2},
        {"decoder": values["decoder"]},
        {**values, "decoder": None},
        {**values, "decoder": {**values["decoder"], "rope": {"theta": 1e4}}},
    ):
        with pytest.raises(ValueError, match="info: "):
            decode(DraftConfig, broken, Path("info"))


def test_arrays_that_are_not_those_saved_are_found(state, tmp_path, monkeypatch):
    save_steps(tmp_path, state, 3)
    read = checkpoint._read

    def flipped(checkpoints, step, **items):
        found = dict(read(checkpoints, step, **items))
        if "params" in found:
            found["params"]["fc"]["kernel"] = found["params"]["fc"]["kernel"].at[5, 7].multiply(-1)
        return found

    monkeypatch.setattr(checkpoint, "_read", flipped)
    for call in (lambda: restore(tmp_path, state[1]), lambda: checkpoint.read_trained_draft(tmp_path)):
        with pytest.raises(
            ValueError, match=r"3: damaged checkpoint: params\['fc'\]\['kernel'\] is not what was saved; delete"
        ):
            call()


def test_a_changed_shape_beside_the_arrays_is_found(state, tmp_path):
    save_steps(tmp_path, state, 3)
    (info,) = (path for path in (tmp_path / "checkpoints" / "3" / "info").iterdir() if '"theta"' in path.read_text())
    info.write_text(info.read_text().replace('"theta": 10000.0', '"theta": 20000.0'))
    with pytest.raises(ValueError, match="3/info: not what was written there: its checksum"):
        checkpoint.read_trained_draft(tmp_path)
