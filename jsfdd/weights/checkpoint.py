"""Checkpoints of a training run: all that a killed run needs to continue to the same bits. Only this file imports Orbax.

    OUT/checkpoints/400/params   the draft's parameters: all that a reader of the finished draft needs
    OUT/checkpoints/400/rest     optimizer state, step and key
    OUT/checkpoints/400/info     JSON: the draft's shape, the run's identity, and checksums of all arrays and of itself
    OUT/best/350/…               the same, of the step whose draft decoded best, where a run decodes while it trains

Orbax writes a step's directory aside and renames it when all of it is written, so a directory named by a number is
whole; what a killed run left behind is removed at the next start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jsfdd.base.checksums import array_checksums
from jsfdd.base.disk import DiskError, writing
from jsfdd.base.files import decode, differences, plain, sealed, unsealed
from jsfdd.base.processes import is_primary, wait_for_all
from jsfdd.base.records import TrainState
from jsfdd.models.draft import Draft, DraftConfig, init_draft

DIRECTORY = "checkpoints"
BEST = "best"
_THREADS_END = 5.0  # seconds
_WRAPPED = (ValueError, RuntimeError)  # Orbax and TensorStore wrap the system's errors in these
_REMEDY = "delete it to fall back on an earlier one"


def _says_it_twice(record: logging.LogRecord) -> bool:
    """Whether Orbax logs, with a traceback, an error that it also raises in the calling thread."""
    return "_SignalingThread.run() raised an exception" in record.getMessage()


logging.getLogger("absl").addFilter(lambda record: not _says_it_twice(record))


class Checkpoints:
    """The checkpoints of one run: the last two and, if the run probes, the best. Use it in a `with`.

    Args:
      run: the run's directory, made if missing.
      draft: the shape that is saved beside the parameters.
      identity: JSON-ready; what the run's bits depend on. A run of another identity is not continued.

    Attributes:
      unreported: after `resume`, what `save` was given beside the state.
    """

    def __init__(self, run: Path, draft: DraftConfig, identity: dict):
        self._run, self._info = run, {"draft": draft_to_json(draft), "identity": identity}
        self._manager = _open((run / DIRECTORY).absolute(), kept=2)
        self.unreported: list = []

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The last step that was saved, or None."""
        return self._manager.latest_step()

    def resume(self, fresh: TrainState) -> TrainState:
        """The state that was saved last, with the structure, dtypes and placement of `fresh`; `fresh` itself if none was.

        A best draft of a later step is forgotten: the run will find it again.

        Raises:
          ValueError: the directory holds a run of another identity, or a damaged checkpoint.
        """
        step = self.latest_step
        if step is not None:
            info = _read_info(self._manager, step)
            _check_same(self._run, info["identity"], plain(self._info["identity"]))
            fresh = self._restore(step, fresh, info)
            self.unreported = info.get("unreported", [])
        for directory in (self._run / BEST).glob("*"):
            if is_primary() and directory.name.isdigit() and int(directory.name) > (step or 0):
                shutil.rmtree(directory)
        return fresh

    def _restore(self, step: int, like: TrainState, info: dict) -> TrainState:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        restored = _read(
            self._manager,
            step,
            params=ocp.args.StandardRestore(abstract.params),
            rest=ocp.args.StandardRestore(abstract._replace(params=None)._asdict()),
        )
        for name in ("params", "rest"):
            _check_arrays(self._manager, step, info, name, restored[name])
        return TrainState(**{**restored["rest"], "params": restored["params"]})

    def save(self, state: TrainState, unreported: list | None = None) -> None:
        """Save a state under its own step; whole when this returns. `unreported` is JSON-ready: what `resume` gives back."""
        self._save(self._manager, state, {"unreported": unreported or []})

    def save_best(self, state: TrainState) -> None:
        """Save a state as the best so far, in the place of the one before it."""
        with _open((self._run / BEST).absolute(), kept=1) as manager:
            self._save(manager, state, {})

    def _save(self, manager: ocp.CheckpointManager, state: TrainState, extra: dict) -> None:
        items = {"params": state.params, "rest": state._replace(params=None)._asdict()}
        info = plain(self._info | extra | {"checksums": {name: array_checksums(tree) for name, tree in items.items()}})
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with _removed_if_the_disk_refuses(Path(manager.directory) / str(int(state.step)), size):
            manager.save(int(state.step), args=ocp.args.Composite(**saved, info=ocp.args.JsonSave(sealed(info))))


@contextmanager
def _removed_if_the_disk_refuses(path: Path, size: int) -> Iterator[None]:
    """As `writing`; what was written of the checkpoint is removed, once the threads that write it have ended."""
    threads_before, hook = threading.enumerate(), sys.unraisablehook
    sys.unraisablehook = lambda event: None if _is_of_a_closed_loop(event.exc_value) else hook(event)
    try:
        with writing(path, size, also=_WRAPPED):
            yield
    except DiskError:  # the hook stays and keeps asyncio silent: writes that still run may fail, too
        logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
        for thread in threading.enumerate():
            if thread not in threads_before:
                with contextlib.suppress(OSError, *_WRAPPED):  # Orbax's threads raise their errors here again
                    thread.join(_THREADS_END)
        _remove_unfinished(path.parent)
        raise
    sys.unraisablehook = hook


def _is_of_a_closed_loop(error: BaseException | None) -> bool:
    """Whether a write finished after its loop had been closed because another write failed."""
    return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)


def _remove_unfinished(directory: Path) -> None:
    for left in directory.glob("*"):
        if is_primary() and ocp.utils.is_tmp_checkpoint(left):
            shutil.rmtree(left)


def _open(directory: Path, kept: int) -> ocp.CheckpointManager:
    # Orbax's own clean-up runs in a thread that it only waits for at the next save, and two of them can collide.
    _remove_unfinished(directory)
    wait_for_all("unfinished checkpoints removed")
    options = ocp.CheckpointManagerOptions(max_to_keep=kept, create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory, options=options)


def check_run(run: Path, known: dict) -> None:
    """Check, before the weights are loaded, that a run's directory holds no run of other inputs or options.

    Args:
      run: the directory; need not exist.
      known: the part of the identity that is known by now, JSON-ready.

    Raises:
      ValueError: it holds another run; names what changed.
    """
    directory = run / DIRECTORY
    if not any(directory.glob("[0-9]*")):
        return
    with ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(create=False)) as checkpoints:
        step = checkpoints.latest_step()
        if step is not None:
            saved = _read_info(checkpoints, step)["identity"]
            _check_same(run, {name: saved.get(name) for name in known}, plain(known))


def _check_same(run: Path, saved: dict, present: dict) -> None:
    if changed := differences(saved, present):
        raise ValueError(
            f"{run}: holds a run that was trained on other inputs or options ({changed}); continue it with the same ones, or "
            "choose another --out"
        )


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
    places = [path / name for name in (BEST, DIRECTORY) if any((path / name).glob("[0-9]*"))]
    directory = places[0] if places else path / DIRECTORY if (path / DIRECTORY).is_dir() else path
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{path}: no such directory; give the --out of `jsfdd train`, the checkpoints/ in it, an exported draft, or smollm2"
        )
    with ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(create=False)) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise FileNotFoundError(f"{directory}: no checkpoint in it; train first: `jsfdd train --out {path}`")
        info = _read_info(checkpoints, step)
        # Fields that earlier versions did not have take their defaults.
        config = decode(DraftConfig, info["draft"], directory / str(step) / "info", partial=True)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            jax.eval_shape(lambda: init_draft(config, jax.random.key(0))),
        )
        params = _read(checkpoints, step, params=ocp.args.StandardRestore(abstract))["params"]
        _check_arrays(checkpoints, step, info, "params", params)
        # Orbax binds arrays to the device that it restores them to; decoding may spread them over others.
        params = jax.device_put(jax.device_get(params))
    return Draft(config, params, info["identity"])


def draft_to_json(config: DraftConfig) -> dict:
    """A JSON-ready dict of the draft's shape; `decode(DraftConfig, …)` reads it."""
    return plain(dataclasses.asdict(config))


def _read_info(checkpoints: ocp.CheckpointManager, step: int) -> dict:
    """Read a step's info. ValueError: it is not as it was written."""
    folder = _where(checkpoints, step)
    info = _read(checkpoints, step, info=ocp.args.JsonRestore())["info"]
    if not isinstance(info, dict) or not isinstance(info.get("identity"), dict) or "draft" not in info:
        raise ValueError(f"{folder}: damaged checkpoint: its info names no draft; {_REMEDY}")
    return unsealed(info, f"{folder}/info", _REMEDY)


def _check_arrays(checkpoints: ocp.CheckpointManager, step: int, info: dict, name: str, tree) -> None:
    """Raise ValueError unless an item's arrays are those that were saved. Earlier versions left no checksums."""
    if "checksums" not in info:
        return
    expected, checksums = info["checksums"][name], array_checksums(tree)
    changed = [leaf for leaf in checksums if checksums[leaf] != expected.get(leaf)]
    if changed:
        folder = _where(checkpoints, step)
        raise ValueError(f"{folder}: damaged checkpoint: {name}{changed[0]} is not what was saved; {_REMEDY}")


def _where(checkpoints: ocp.CheckpointManager, step: int) -> Path:
    return Path(checkpoints.directory) / str(step)


def _read(checkpoints: ocp.CheckpointManager, step: int, **items):
    """Read items of one step. Whatever Orbax raises for an incomplete directory becomes one ValueError."""
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        raise ValueError(f"{_where(checkpoints, step)}: damaged checkpoint ({error}); {_REMEDY}") from error
