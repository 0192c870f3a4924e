"""Moves the shards of one store into another: hidden states that were kept before it was known what they would belong to.

    adopt(kept / "hidden", out / "hidden", identity=…, kept_for=…, wanted=ids)

The files are moved, not copied, so no disk is needed. Killed at any byte, a second call goes on: shards that were moved are
named in a manifest of their own beside the other store's, which its writer takes over when it opens the store (`writer.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from jsfdd.base.files import plain, sync
from jsfdd.hidden.store import MANIFEST, read_manifest, write_manifest

_ADOPTED = "manifest-adopted.json"  # a name that the writer looks for


def adopt(source: Path, directory: Path, *, identity: dict, kept_for: dict, wanted: Collection[str]) -> None:
    """Move the shards of the store in `source`. Open the store in `directory` with a `HiddenWriter` next.

    Args:
      source: a closed store; left without its shards.
      directory: of the other store; may not exist yet.
      identity, kept_for: of the other store, as its writer will be given them.
      wanted: samples that the other store should have; others are dropped.

    Raises:
      FileNotFoundError, ValueError: `source` is no store, or its manifest is damaged.
    """
    manifest = read_manifest(source / MANIFEST)
    directory.mkdir(parents=True, exist_ok=True)
    # Of a call that was killed before the other store's writer took over what it had moved.
    earlier = read_manifest(directory / _ADOPTED)["shards"] if (directory / _ADOPTED).exists() else []
    shards = {shard["file"]: shard for shard in earlier}
    for shard in manifest["shards"]:
        # In both places if it was adopted before and rewritten since, in neither if its samples were dropped there.
        if (source / shard["file"]).exists() != (directory / shard["file"]).exists():
            samples = [(name if name in wanted else None, length) for name, length in shard["samples"]]
            shards[shard["file"]] = {**shard, "samples": samples}
    head = {**manifest, "identity": plain(identity), "kept_for": plain(kept_for), "shards": list(shards.values())}
    write_manifest(directory / _ADOPTED, head)
    for file in shards:
        if (source / file).exists():
            (source / file).rename(directory / file)
    sync(directory)
