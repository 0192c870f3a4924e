"""Hugging Face datasets by name: `hf:NAME`, `hf:NAME:SPLIT`, `hf:NAME@CONFIG` or `hf:NAME@CONFIG:SPLIT`.

They need the extra `datasets`, and the network or a copy in the library's cache. The default split is "train". Only data is
read: the library refuses a dataset that needs its own script.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

from jsfdd.data.messages import MEDIA

_NAME = re.compile(r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


def is_dataset(name: str) -> bool:
    """Whether a name of --data or --prompts means a dataset rather than a file."""
    return name.startswith("hf:")


def dataset_rows(name: str, columns: Collection[str] | None, beside: Counter[str] | None = None) -> Iterator[dict]:
    """The rows of a dataset, in its order.

    Args:
      name: as in the module's docstring.
      columns: those to read, as far as the dataset has them; all if None.
      beside: to it the others are added, each with the number of rows.

    Raises ValueError if the name is malformed, the extra is missing, the dataset has no such config or split, or none of
    the columns; FileNotFoundError if the dataset is neither in the cache nor within reach.
    """
    dataset = _loaded(name)
    if columns is not None:
        wanted = [column for column in dataset.column_names if column in columns]
        if not wanted:
            present, readable = ", ".join(dataset.column_names), ", ".join(sorted(set(columns) - MEDIA))
            raise ValueError(f"{name}: no column of {readable}; it has {present}")
        if beside is not None:
            beside.update(dict.fromkeys((column for column in dataset.column_names if column not in columns), len(dataset)))
        dataset = dataset.select_columns(wanted)
    return iter(dataset)


def _loaded(name: str):
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ValueError(f"{name}: a dataset is named hf:NAME, hf:NAME:SPLIT or hf:NAME@CONFIG:SPLIT")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name}: reading a Hugging Face dataset needs the package datasets; run: pip install 'jsfdd[datasets]'"
        ) from error
    try:
        return datasets.load_dataset(parts["name"], parts["config"], split=parts["split"] or "train")
    except OSError as error:  # what the library and its HTTP client raise for everything out of reach
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{name}: not in the cache, and the hub does not give it ({type(error).__name__}: {reason}); check the name and "
            "the network, log in for a gated dataset, or give a downloaded copy's .parquet or .jsonl files"
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}; name another split or config: hf:NAME@CONFIG:SPLIT") from error
