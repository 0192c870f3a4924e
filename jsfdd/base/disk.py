"""A disk that refuses a write: one error that names the file, what was wanted and what is free.

with writing(path, wanted=len(data)):
    path.write_bytes(data)
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


class DiskError(OSError):
    """A write failed for want of room, of quota or of a sound disk. The message is for the user."""

    def __init__(self, message: str):
        super().__init__(message)


@contextmanager
def writing(path: str | Path, wanted: int | None = None, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what the system says of a full or broken disk into a DiskError.

    Args:
      path: what is being written, for the message.
      wanted: its bytes, if known.
      also: exceptions in which libraries wrap what the system says; their text is searched for it.

    Raises:
      DiskError: the disk refused. Other errors pass as they are.
    """
    try:
        yield
    except DiskError:
        raise
    except (OSError, *also) as error:
        number = refusal(error)
        if number is None:
            raise
        raise disk_error(path, number, wanted) from error


def disk_error(path: str | Path, number: int, wanted: int | None = None) -> DiskError:
    """The error of a refused write, by the system's number for it."""
    size = "" if wanted is None else f"{_words(wanted)} wanted, "
    return DiskError(
        f"{path}: {os.strerror(number).lower()}: {size}{_words(free_bytes(path))} free; make room, or repair the disk, and "
        "start the same command again, which continues"
    )


def refusal(error: BaseException) -> int | None:
    """The number of the system's error that an exception stands for, if the disk is at fault."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return error.errno
    return next((number for number in _REFUSALS if os.strerror(number) in str(error)), None)


def free_bytes(path: str | Path) -> int:
    """What is free where `path` is or will be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _words(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size:,} bytes"
