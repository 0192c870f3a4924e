"""One directory, one writer: a lock on what a command writes, which the system takes back when its process dies.

    with sole_writer(out):
        …                       # a second process that comes here meanwhile gets a ValueError with host and process

The lock is `flock` on OUT/.lock (OUT is a directory) or on .NAME.lock beside a file that is written; the file says who holds
it and goes when the work is done. Where a file system passes no locks between hosts, or knows none, the holder's sign of life
stands in: it touches the file every few seconds, and who comes from another host watches for that before taking over.
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
from contextlib import contextmanager
from pathlib import Path

from jsfdd.base.processes import is_primary, true_on_primary

_BEAT = 5.0  # seconds between two signs of life
_SILENCE = 4 * _BEAT  # after which a holder of whom no lock is known counts as dead
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

_held: set[Path] = set()  # by this process: a run locks its directory, and so does a stage of it


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Hold the lock on `out`, a directory or a file to be written; its directory must be there.

    Several processes of one run call this together, and process 0 holds the lock for all.

    Raises:
      ValueError: another process holds it; names its host and number.
    """
    path = (out / ".lock" if out.is_dir() else out.with_name(f".{out.name}.lock")).absolute()
    if path in _held:
        yield
        return
    lock, refusal = _take(path) if is_primary() else (None, "")
    if not true_on_primary(lock is not None):
        raise ValueError(refusal or _refusal(path))
    _held.add(path)
    ended = threading.Event()
    try:
        if lock is not None:
            threading.Thread(target=_show_life, args=(lock, ended), daemon=True, name="sign of life").start()
        yield
    finally:
        ended.set()
        _held.discard(path)
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)


def _take(path: Path) -> tuple[int | None, str]:
    """(the descriptor that holds the lock, ""), or (None, why not)."""
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
        # Who held it may have deleted the file between our two calls: then ours has no name, and guards nothing.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            break
        os.close(lock)
    holder = _holder(path)
    if holder and (not locks or holder.get("host") != socket.gethostname()) and _lives(path):
        refusal = _refusal(path)
        os.close(lock)
        return None, refusal
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    return lock, ""


def _lives(path: Path) -> bool:
    """Whether the holder touches the file while we look. Clocks of two hosts are not compared."""
    before, until = _touched(path), time.monotonic() + _SILENCE
    while time.monotonic() < until:
        time.sleep(_BEAT / 5)
        if _touched(path) != before:
            return True
    return False


def _touched(path: Path) -> int:
    """When, in the file system's own time; opening the file makes NFS ask its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _show_life(lock: int, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        os.utime(lock)


def _holder(path: Path) -> dict:
    """What the lock's file says of its holder; nothing where it says nothing."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _refusal(path: Path) -> str:
    holder = _holder(path)
    who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
    return f"{path.parent}: {who} is writing here (it holds {path.name}); wait for its end, stop it, or choose another --out"
