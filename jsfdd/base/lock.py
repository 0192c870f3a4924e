"""A lock on a command's output, so that only one process writes it. The system releases the lock if the process dies.

    with sole_writer(out):
        …                       # meanwhile a second process gets a ValueError that names host and process

The lock is `flock` on OUT/.lock if OUT is a directory, or on .NAME.lock beside a file, or beside a directory that is moved into
place. The lock file names the holder, and is deleted at the end. Some file systems do not share locks between hosts, or have
none. So the holder also touches the file every few seconds, and a process on another host watches for that before it takes
over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jsfdd.base.disk import writing
from jsfdd.base.processes import is_primary, true_on_primary

_BEAT = 5.0  # seconds between two signs of life
_SILENCE = 4 * _BEAT  # seconds without a sign of life after which a holder counts as dead if the system shows no lock
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

_held: set[Path] = set()  # locks of this process: a run locks its directory, and so do the stages in it


@contextmanager
def sole_writer(out: Path, *, moved: bool = False) -> Iterator[None]:
    """Hold the lock on `out`, a directory or a file to be written, whose directory must exist.

    Several processes of one run call this together, and process 0 holds the lock for all of them.

    Args:
      out: what is written.
      moved: whether `out` is a directory that appears whole, at the end. Its lock then stays beside it: were it to depend on
        whether `out` is there, the lock file of a killed process would never be found again.

    Raises:
      ValueError: another process holds it; names its host and number.
    """
    path = (out / ".lock" if out.is_dir() and not moved else out.with_name(f".{out.name}.lock")).absolute()
    if path in _held:
        yield
        return
    lock, refusal = _take(path) if is_primary() else (None, "")
    if not true_on_primary(lock is not None):
        raise ValueError(refusal or _refusal(path))
    _held.add(path)
    ended = threading.Event()
    alive = threading.Thread(target=_show_life, args=(lock, ended), daemon=True, name="sign of life")
    try:
        if lock is not None:
            alive.start()
        yield
    finally:
        ended.set()
        _held.discard(path)
        if lock is not None:
            alive.join()
            path.unlink(missing_ok=True)
            os.close(lock)


def _take(path: Path) -> tuple[int | None, str]:
    """Try to take the lock: (its file descriptor, ""), or (None, the reason why not)."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        locks = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None, _refusal(path)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                os.close(lock)
                raise
            locks = False
        # The previous holder may have deleted the file between our two calls. Then our lock guards nothing: try again.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            break
        os.close(lock)
    holder = _holder(path)
    if holder and (not locks or holder.get("host") != socket.gethostname()) and _lives(path):
        refusal = _refusal(path)
        os.close(lock)
        return None, refusal
    data = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    try:
        with writing(path, len(data)):
            os.ftruncate(lock, 0)
            os.pwrite(lock, data, 0)
    except OSError:
        path.unlink()
        os.close(lock)
        raise
    return lock, ""


def _lives(path: Path) -> bool:
    """Whether the holder touches the file while we watch. This needs no common clock of the two hosts."""
    before, until = _touched(path), time.monotonic() + _SILENCE
    while time.monotonic() < until:
        time.sleep(_BEAT / 5)
        if _touched(path) != before:
            return True
    return False


def _touched(path: Path) -> int:
    """The file's modification time. The file is opened first, which makes NFS ask its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _show_life(lock: int, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with suppress(OSError):  # a disk that fails will be found by what is written
            os.utime(lock)


def _holder(path: Path) -> dict:
    """The holder's host and process from the lock file; empty if it has none."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _refusal(path: Path) -> str:
    holder = _holder(path)
    who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
    return f"{path.parent}: {who} is writing here (it holds {path.name}); wait for its end, stop it, or choose another --out"
