"""Every stage in turn, alone or as one of the processes of a run; started by test_base_processes.py."""

import errno
import time
from pathlib import Path

from jsfdd.base.processes import start

LATE = 1.0  # seconds


def every_stage(folder: Path, out: Path, *place) -> None:
    """Args:
    folder: holds target/, chats.jsonl and prompts.jsonl.
    place: coordinator, number of processes, number of this one; nothing where it is alone.
    """
    if place:
        start(*place)
    from jsfdd.commands import evaluate, score, select, train
    from jsfdd.commands.evaluate import EvaluateConfig
    from jsfdd.commands.options import from_options
    from jsfdd.commands.score import ScoreConfig
    from jsfdd.commands.select import SelectConfig
    from jsfdd.commands.train import TrainConfig

    target = str(folder / "target")
    shared = dict(target=target, data=(folder / "chats.jsonl",), max_length=128)
    score.score(from_options(ScoreConfig, **shared, batch_tokens=256, out=out))
    select.select(from_options(SelectConfig, scores=out / "scores.parquet", retain_ratio=0.5, out=out))
    training = from_options(
        TrainConfig,
        **shared,
        batch_tokens=512,
        epochs=2,
        held_out_share=0.1,
        selection=out / "selection.json",
        out=out / "draft",
    )
    train.run(training, train.prepare(training))
    evaluate.evaluate(
        from_options(
            EvaluateConfig,
            target=target,
            draft=(out / "draft",),
            prompts=(folder / "prompts.jsonl",),
            out=out / "evaluated",
            max_new_tokens=8,
            num_draft_tokens=2,
            batch_size=4,
        )  # fmt: skip
    )


def every_stage_late(folder: Path, out: Path, coordinator: str, count: int, number: int) -> None:
    """The same on a file system that shows a process the others' parts, shards and manifests late."""
    names = {f"{name}-{other:05d}{end}" for other in range(count) for name, end in (("part", ".parquet"), ("shard", ".bin"))}
    names |= {f"manifest-{other}.json" for other in range(1, count)}
    own = {f"part-{number:05d}.parquet", f"shard-{number:05d}.bin", f"manifest-{number}.json"}
    others = names - own if number == 0 else names - own | {"manifest.json"}
    stat, glob = Path.stat, Path.glob

    def late_stat(path, **options):
        found = stat(path, **options)
        if path.name in others and time.time() - found.st_ctime < LATE:
            raise FileNotFoundError(errno.ENOENT, "not shown yet", str(path))
        return found

    Path.stat = late_stat
    Path.glob = lambda path, pattern: (found for found in glob(path, pattern) if found.exists())
    every_stage(folder, out, coordinator, count, number)
