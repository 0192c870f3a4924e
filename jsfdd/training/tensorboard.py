"""Write the lines of metrics.jsonl as TensorBoard scalars; needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_board(directory: Path, start: int) -> Iterator[Callable[[dict], None]]:
    """`write(line)` puts a line's numbers into event files in `directory`, at the line's step.

    Args:
      start: the step at which a run goes on; later steps that an earlier start wrote are hidden.

    Raises:
      ValueError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs tensorboardX: pip install 'jsfdd[tensorboard]', or leave it out") from None
    with SummaryWriter(str(directory), purge_step=start + 1) as board:

        def write(line: dict) -> None:
            for name, value in scalars(line).items():
                board.add_scalar(name, value, line["step"])

        yield write


def scalars(line: dict) -> dict[str, float]:
    """A line's numbers by name, without the step: "part/name" in a nested object, "name/1", … in a list."""
    numbers = {}
    for name, value in line.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{inner}": number for inner, number in scalars(value).items()}
        elif isinstance(value, list):
            numbers |= {f"{name}/{place}": number for place, number in enumerate(value, 1) if number is not None}
        elif name != "step":
            numbers[name] = float(value)
    return numbers
