"""Checkpoints of a training run: all that a killed run needs to go on to the same bits. Only this file imports Orbax.

    OUT/checkpoints/400/params   the draft's parameters: all that a reader of the finished draft needs
    OUT/checkpoints/400/rest     optimizer state, step and key
    OUT/checkpoints/400/info     JSON: the draft's shape, and the run's identity
    OUT/best/350/…               the same, of the step whose draft decoded best, where a run decodes while it trains

Orbax writes a step's directory aside and renames it when all of it is written, so a directory named by a number is
whole; what a killed run left behind is removed at the next start.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jsfdd.base.files import decode, plain
from jsfdd.base.processes import is_primary, wait_for_all
from jsfdd.base.records import TrainState
from jsfdd.models.draft import Draft, DraftConfig, init_draft

DIRECTORY = "checkpoints"
BEST = "best"


def open_checkpoints(run: Path) -> ocp.CheckpointManager:
    """The checkpoints of the run in directory `run`, made if missing; the last two are kept. Close it after use."""
    return _open((run / DIRECTORY).absolute(), kept=2)


def save_best(run: Path, state: TrainState, draft_config: DraftConfig, identity: dict) -> None:
    """Save `state` as the best so far, in the place of the one before it."""
    with _open((run / BEST).absolute(), kept=1) as checkpoints:
        save(checkpoints, state, draft_config, identity)


def drop_best_after(run: Path, step: int) -> None:
    """Forget a best draft of a later step: a run that continues at `step` will find it again."""
    for directory in (run / BEST).glob("*"):
        if directory.name.isdigit() and int(directory.name) > step:
            shutil.rmtree(directory)


def _open(directory: Path, kept: int) -> ocp.CheckpointManager:
    # Orbax's own clean-up runs in a thread that it only waits for at the next save, and two of them can collide.
    for left in directory.glob("*"):
        if is_primary() and ocp.utils.is_tmp_checkpoint(left):
            shutil.rmtree(left)
    wait_for_all("unfinished checkpoints removed")
    options = ocp.CheckpointManagerOptions(max_to_keep=kept, create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory, options=options)


def latest_step(checkpoints: ocp.CheckpointManager) -> int | None:
    """The last step that was saved, or None."""
    return checkpoints.latest_step()


def save(checkpoints: ocp.CheckpointManager, state: TrainState, draft_config: DraftConfig, identity: dict) -> None:
    """Save `state` under its own step; whole when this returns.

    Args:
      identity: JSON-ready; what the run's bits depend on, for `read_identity`.
    """
    rest = state._replace(params=None)._asdict()
    checkpoints.save(
        int(state.step),
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(rest),
            info=ocp.args.JsonSave({"draft": draft_to_json(draft_config), "identity": identity}),
        ),
    )


def read_identity(checkpoints: ocp.CheckpointManager, step: int) -> dict:
    """The identity saved at `step`, as it comes back from JSON. ValueError if the checkpoint is damaged."""
    return _read(checkpoints, step, info=ocp.args.JsonRestore())["info"]["identity"]


def restore(checkpoints: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`, with the structure, dtypes and placement of `like`. ValueError if it is damaged."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    found = _read(
        checkpoints,
        step,
        params=ocp.args.StandardRestore(abstract.params),
        rest=ocp.args.StandardRestore(abstract._replace(params=None)._asdict()),
    )
    return TrainState(**{**found["rest"], "params": found["params"]})


def read_trained_draft(path: str | Path) -> Draft:
    """A training run's draft, its parameters on the first device; its record is the run's identity.

    Args:
      path: the run's directory, for the draft that decoded best where the run looked and the last one elsewhere; or the
        checkpoints/ in it, for the last one.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the checkpoint is damaged, or of a draft that this version does not know.
    """
    path = Path(path)
    within = [path / name for name in (BEST, DIRECTORY) if any((path / name).glob("[0-9]*"))]
    directory = within[0] if within else path / DIRECTORY if (path / DIRECTORY).is_dir() else path
    if not directory.is_dir():
        raise FileNotFoundError(f"{path}: no such directory; give the --out of `jsfdd train` or the checkpoints/ in it")
    with ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(create=False)) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise FileNotFoundError(f"{directory}: no checkpoint in it; train first: `jsfdd train --out {path}`")
        info = _read(checkpoints, step, info=ocp.args.JsonRestore())["info"]
        config = decode(DraftConfig, info["draft"], directory / str(step) / "info")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            jax.eval_shape(lambda: init_draft(config, jax.random.key(0))),
        )
        params = _read(checkpoints, step, params=ocp.args.StandardRestore(abstract))["params"]
        # Orbax binds arrays to the device that it restores them to; decoding may spread them over others.
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
    return Draft(config, params, info["identity"])


def draft_to_json(config: DraftConfig) -> dict:
    """A JSON-ready dict of the draft's shape, of which `decode(DraftConfig, …)` makes the shape again."""
    return plain(dataclasses.asdict(config))


def _read(checkpoints: ocp.CheckpointManager, step: int, **items):
    """Items of one step; whatever Orbax raises for a directory that is there in part becomes one ValueError."""
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, OSError) as error:
        where = Path(checkpoints.directory) / str(step)
        raise ValueError(f"{where}: damaged checkpoint; delete it to fall back on an earlier one ({error})") from error
