"""A run of several processes: how they find each other, agree on what they do, and wait for each other.

Every process runs the same command. Their devices form one mesh; each process reads its own rows and keeps its own
results, and process 0 writes the files that exist once. All of them write to one directory that every process sees (NFS, a
mounted bucket, one machine).

    start(coordinator="10.0.0.1:8476", num_processes=4, process_id=0)      # first, before anything touches a device
    agree({"options": …, "data": …})                                       # ValueError on all if one differs
    if is_primary(): …write…
    wait_for_all("scores merged")
    wait_until_seen([path])                                                # the same, and every process sees the file
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

AUTO = "auto"
_HEARTBEAT = 60  # seconds of silence after which a process counts as dead and the others end
_SHUTDOWN = 60  # seconds to wait for the others at a normal end
_START = 300  # seconds to wait for the others at the start
_UNSEEN = 60.0  # seconds after which a file that another process wrote counts as lost; NFS shows some that late
_WHOLE = 1 << 20  # bytes of a file up to which its contents are compared, not its size alone


def start(coordinator: str | None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the run's processes. Call it before the first use of a device; a second call changes nothing.

    Args:
      coordinator: None for a single process; "auto" where JAX finds the others by itself (a TPU pod, SLURM, Open MPI);
        otherwise HOST:PORT of process 0, the same in every process, together with the next two arguments.
      num_processes: how many processes there are.
      process_id: the number of this one, from 0.

    Raises:
      ValueError: the arguments do not fit together.
    """
    check_place(coordinator, num_processes, process_id)
    if coordinator is None or jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM (`interrupts.py`)
    timeouts = dict(heartbeat_timeout_seconds=_HEARTBEAT, shutdown_timeout_seconds=_SHUTDOWN, initialization_timeout=_START)
    if coordinator == AUTO:
        jax.distributed.initialize(**timeouts)
    else:
        jax.distributed.initialize(coordinator, num_processes, process_id, **timeouts)


def check_place(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raise ValueError unless `start` takes these arguments together."""
    explicit = num_processes is not None, process_id is not None
    if coordinator is None or coordinator == AUTO:
        if any(explicit):
            raise ValueError("--num-processes and --process-id go with --coordinator HOST:PORT")
    else:
        if not all(explicit):
            raise ValueError(f"--coordinator {coordinator}: give --num-processes and --process-id too, or --coordinator auto")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator: got {coordinator!r}, but it must be HOST:PORT or auto")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process-id {process_id}: must be from 0 to {num_processes - 1} (--num-processes)")


def is_primary() -> bool:
    """Whether this process writes the files that exist once."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than one process. Touches no device unless `start` joined processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def wait_for_all(moment: str) -> None:
    """Wait until every process has reached `moment`. If a process has died, this fails within about a minute."""
    if several():
        multihost_utils.sync_global_devices(moment)


def true_on_primary(value: bool) -> bool:
    """Process 0's `value`, in every process."""
    return bool(_gather(np.array([value]))[0, 0]) if several() else value


def agree(values: dict) -> None:
    """Raise ValueError, in every process, if one of `values` (JSON-ready) is not the same in all of them."""
    if not several():
        return
    names = sorted(values)
    digests = [_digest(names)] + [_digest(values[name]) for name in names]
    heads = _gather(digests[0])
    if (heads != heads[0]).any():
        raise ValueError("the processes run different commands; start the same one on all of them")
    gathered = _gather(np.stack(digests))  # [processes, names + 1, 32]
    for number, name in enumerate(names, 1):
        differ = np.flatnonzero((gathered[:, number] != gathered[0, number]).any(axis=1)).tolist()
        if differ:
            raise ValueError(
                f"process {', '.join(map(str, differ))} and process 0 differ in {name} (here: {_shown(values[name])}); "
                "give all processes the same options and the same files"
            )


def agree_on_directory(directory: Path) -> None:
    """Make `directory`. Raise ValueError, in every process, unless all of them see the same one."""
    directory.mkdir(parents=True, exist_ok=True)
    if not several():
        return
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(uuid.uuid4().bytes, np.uint8))
    name = directory / f".seen-by-all-{bytes(np.asarray(token, np.uint8)).hex()}"
    if is_primary():
        name.touch()
    blind = _who_lacks({name: _mark(name)} if is_primary() else {})
    if is_primary():
        name.unlink()
    if blind:
        raise ValueError(
            f"{directory}: process {', '.join(map(str, blind))} does not see what process 0 writes there; give an --out "
            "on a file system that all of them share"
        )


def wait_until_seen(written: Iterable[Path]) -> None:
    """Wait for all processes, and until each of them sees what any of them has written.

    A shared file system may show a new file late, or an old one in its place.

    Args:
      written: the files that this process has written and that nobody changes meanwhile.

    Raises:
      ValueError: in every process, if one does not see a file within a minute; names the file.
    """
    if not several():
        return
    marks = {path: _mark(path) for path in written}
    blind = _who_lacks(marks)
    for process, path in blind.items():
        raise ValueError(
            f"{path}: process {process} does not see this file, which another process has written, after {_UNSEEN:.0f} s; give "
            "an --out on a file system that all of them share, and start all of them again with the same command"
        )


def _who_lacks(marks: dict[Path, str]) -> dict[int, str]:
    """The processes that do not see the files of all processes in time, and a file that each lacks."""
    missing: dict[str, str] = {}
    for known in _gather_json({str(path): mark for path, mark in marks.items()}):
        missing |= known
    until = time.monotonic() + _UNSEEN
    while missing := {path: mark for path, mark in missing.items() if _mark(Path(path)) != mark}:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return {process: path for process, path in enumerate(_gather_json(min(missing, default=None))) if path is not None}


def _mark(path: Path) -> str:
    """What tells a whole file from none, a part of it or an older one; empty if there is none."""
    try:
        os.listdir(path.parent)  # makes NFS refresh its cache
        size = path.stat().st_size
        return f"{size} {hashlib.sha256(path.read_bytes()).hexdigest() if size <= _WHOLE else ''}"
    except FileNotFoundError:
        return ""


def _gather_json(value) -> list:
    """A JSON-ready value from every process."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _gather(np.array([len(data)]))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    return [json.loads(row[:size].tobytes()) for row, size in zip(_gather(padded), sizes)]


def _gather(value: np.ndarray) -> np.ndarray:
    """Gather `value` from every process: [processes, …]."""
    return np.asarray(multihost_utils.process_allgather(value))


def _digest(value) -> np.ndarray:
    text = json.dumps(value, sort_keys=True, default=str)
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)


def _shown(value) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
