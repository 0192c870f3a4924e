"""Sample-level flatness-based dataset distillation (arXiv 2601.18902): keep the samples with the flattest targets.

    selection = select(read_scores(path), 0.5)
    kept = selected_samples(selection, samples)

The paper's baselines select by other metrics (`scoring/metrics.py`); `random` is the control.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

from jsfdd.base.files import decode, differences, read_json, sha256, write_json
from jsfdd.base.records import has_repeats
from jsfdd.scoring.metrics import METRICS, MetricName
from jsfdd.selection.clusters import cluster_prompts

if TYPE_CHECKING:  # the command line imports this module, and must start fast
    from jsfdd.base.records import Sample
    from jsfdd.scoring.table import ScoreTable

Within = Literal["all", "source", "cluster"]

_REMEDY = "select again with `jsfdd select`"
_ROWS = 100_000  # at a time, where ids become one text


@dataclasses.dataclass(frozen=True)
class Selection:
    """The samples that were kept, and by which rule.

    Attributes:
      ids: samples that were kept, in the order of the data.
      dropped: samples without a counted token, in the order of the data: nothing to train on, so they were not ranked.
      metric, retain_ratio, seed, within: the arguments of `select`; only the metric random and clusters depend on the seed.
      thresholds: source or cluster (or "all") -> the score of the last sample kept. Samples with lower scores were not kept
        (with higher ones for top1 and margin).
      inputs: identity and hash of the scores.
      sizes: source or cluster (or "all") -> samples that were ranked there; empty in a file from before it was recorded.
    """

    ids: tuple[str, ...]
    dropped: tuple[str, ...]
    metric: str
    retain_ratio: float
    seed: int
    within: Within
    thresholds: dict[str, float]
    inputs: dict
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_options(self.metric, self.retain_ratio, self.within)
        if not self.ids:
            raise ValueError("no id is kept")
        if has_repeats(self.ids + self.dropped):
            raise ValueError("an id occurs twice")


def select(
    table: ScoreTable,
    retain_ratio: float = 0.5,
    *,
    metric: MetricName = "flatness",
    within: Within = "all",
    seed: int = 0,
) -> Selection:
    """Keep the k = max(1, round(retain_ratio·N)) most uncertain of the N samples that have a counted token.

    Half a sample always rounds up (Python's `round` goes to the even neighbour). Among equal scores, smaller ids are kept
    first. The choice does not depend on the order of the data; for `random` it depends only on the seed and the ids.

    Args:
      table: the scores of all samples.
      retain_ratio: in (0, 1].
      metric: the metric that ranks the samples.
      within: "source" ranks the samples of each source separately and keeps the same share of each, at least one; "cluster"
        those of each cluster of like prompts (`clusters.py`). This is not in the paper: ranked together, its metrics mostly
        choose between sources (experiments/013 and 014), and within clusters flatness beat chance (014 and 022).
      seed: for the metric random, and for the clusters.

    Raises:
      ValueError: an unknown metric or `within`, a ratio out of range, no sample to rank, or no prompts' states for clusters.

    Example:
      >>> from jsfdd.scoring.table import ScoreTable
      >>> scores = {"flatness": np.array([0.01, 0.03, 0.02])}
      >>> select(ScoreTable(("a", "b", "c"), ("chat",) * 3, np.array([9, 9, 9]), scores, {}), 0.34).ids
      ('b',)
    """
    _check_options(metric, retain_ratio, within)
    ranked = np.flatnonzero(table.num_tokens > 0)
    if not len(ranked):
        raise ValueError("no sample has a token that counts: every answer is empty or one token long; check the data")
    strata = _strata(table, ranked, within, seed)
    sizes = {name: len(rows) for name, rows in strata.items()}
    quotas, kept, thresholds = shares(retain_ratio, sizes), [], {}
    for name, rows in strata.items():
        keys = _ascending(metric, _scores(table, metric, rows, seed))
        if np.isnan(keys).any():
            broken = [table.ids[row] for row in rows[np.isnan(keys)]]
            raise ValueError(f"the {metric} of these samples is not a number: {_few(broken)}; score again")
        chosen, last = _first(table, rows, keys, quotas[name])
        kept.append(rows[chosen])
        thresholds[name] = float(_ascending(metric, keys[last]))  # the score again
        del keys  # of ten million rows each array takes 80 MB
    kept = np.sort(np.concatenate(kept))
    return Selection(
        ids=tuple(table.ids[i] for i in kept),
        dropped=tuple(table.ids[i] for i in np.flatnonzero(table.num_tokens == 0)),
        metric=metric,
        retain_ratio=retain_ratio,
        seed=seed,
        within=within,
        thresholds=thresholds,
        inputs={"scores": table.identity, "scores_sha256": _digest(table)},
        sizes=sizes,
    )


def strata_of(table: ScoreTable, selection: Selection) -> dict[str, list[str]]:
    """The ids that `selection` ranked together: source or cluster (or "all") -> ids, in the order of the data."""
    ranked = np.flatnonzero(table.num_tokens > 0)
    strata = _strata(table, ranked, selection.within, selection.seed)
    return {name: [table.ids[row] for row in np.sort(rows)] for name, rows in strata.items()}


def how_many(retain_ratio: float, number: int) -> int:
    """How many of `number` samples to keep: at least one; half a sample rounds up."""
    return max(1, math.floor(retain_ratio * number + 0.5))


def shares(retain_ratio: float, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many samples to keep of each group: at least one, in all as many as of all together, if that is no fewer.

    Shares are rounded by largest remainder; of equal ones, the smaller name gains.

    Example:
      >>> shares(0.5, {"a": 3, "b": 3, "c": 4})
      {'a': 2, 'b': 1, 'c': 2}
    """
    exact = {name: retain_ratio * size for name, size in sizes.items()}
    kept = {name: max(1, math.floor(share)) for name, share in exact.items()}
    left = how_many(retain_ratio, sum(sizes.values())) - sum(kept.values())
    for name in sorted(sizes, key=lambda name: (kept[name] - exact[name], name))[: max(0, left)]:
        kept[name] += 1
    return kept


def place_in_order(metric: str, score: float, sample_id: str) -> tuple[float, str]:
    """The sort key by which `select` keeps samples, the smallest first. Keys of different samples differ."""
    return _ascending(metric, score), sample_id


def random_score(seed: int, sample_id: str) -> float:
    """A sample's score under the metric `random`, in [0, 1). It depends on its arguments only, so scoring is not needed."""
    digest = hashlib.sha256(f"jsfdd random: {seed}: {sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def selected_samples(selection: Selection, samples: Sequence[Sample]) -> list[Sample]:
    """The samples that were kept, in the order of the data. ValueError names samples that the data lacks."""
    missing = sorted({*selection.ids, *selection.dropped} - {sample.id for sample in samples})
    if missing:
        raise ValueError(
            f"the data lacks {len(missing)} of the samples that the selection was made from: {_few(missing)}; give the "
            f"files that were scored, or score and {_REMEDY}"
        )
    kept = set(selection.ids)
    return [sample for sample in samples if sample.id in kept]


# The inputs of a selection, besides its options, with words for messages. Dtype and masks may differ: the samples are the same.
_INPUTS = {"target": "the target's weights", "tokenizer": "the target's tokenizer", "tokens": "the chats"}
_CAUSES_OF_OTHER_TOKENS = ("data", "max_length", "date")


def check_inputs(selection: Selection, identity: dict, path: Path) -> None:
    """Check that a selection was made from the scores of these inputs.

    Args:
      identity: the identity of the present inputs, or the known part of it (`commands.inputs.Loaded.identity`).
      path: the selection's file, for the message.

    Raises:
      ValueError: it was made from other inputs; names the input that changed, and the remedy.
    """
    scored = selection.inputs.get("scores", {})
    changed = [name for name in _INPUTS if name in scored and name in identity and scored[name] != identity[name]]
    if not changed:
        return
    words = ", ".join(_INPUTS[name] for name in changed)
    why = [name for name in _CAUSES_OF_OTHER_TOKENS if name in identity and scored.get(name) != identity[name]]
    if changed == ["tokens"]:
        words += f" (in {', '.join(why)})" if why else " (by the chat template or the ids)"
    raise ValueError(
        f"{path}: made from other inputs than these: {words} changed since they were scored; give the ones that were "
        f"scored, or score and {_REMEDY}"
    )


def write_selection(path: Path, selection: Selection) -> None:
    """Write selection.json atomically."""
    # `asdict` would copy every id by itself.
    write_json(path, {field.name: getattr(selection, field.name) for field in dataclasses.fields(Selection)})


def read_selection(path: Path) -> Selection:
    """Read selection.json.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or not a selection; names file, value and remedy.
    """
    values = read_json(path, dict, remedy=_REMEDY)
    try:
        return decode(Selection, values | {"sizes": values.get("sizes", {})}, path)
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from None


def selection_facts(path: Path, identity: dict | None) -> dict:
    """The facts of selection.json for a model card; JSON-ready, without the lists of ids.

    Args:
      identity: the identity of the training run that used the selection, if known.

    Raises:
      FileNotFoundError: as in `read_selection`.
      ValueError: as in `read_selection`, or the selection was made for another target than the run's.
    """
    selection = read_selection(path)
    if identity is not None:
        keys = ("target", "tokenizer")
        scored, trained = ({key: inputs.get(key) for key in keys} for inputs in (selection.inputs["scores"], identity))
        if changed := differences(scored, trained):
            raise ValueError(f"{path}: not the selection that the draft was trained on ({changed}); give its own --selection")
    facts = dataclasses.asdict(selection)
    return {key: facts[key] for key in ("metric", "retain_ratio", "thresholds", "within", "seed")} | {
        "kept": len(selection.ids),
        "dropped": len(selection.dropped),
        "sha256": sha256(path),
    }


def _check_options(metric: str, retain_ratio: float, within: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r:.80} is unknown; choose from {', '.join(METRICS)}")
    if not 0 < retain_ratio <= 1:
        raise ValueError(f"retain_ratio is {retain_ratio}, but it must be a share of the samples in (0, 1]")
    if within not in typing.get_args(Within):
        raise ValueError(f"within {within!r:.80} is unknown; choose from {', '.join(typing.get_args(Within))}")


def _strata(table: ScoreTable, ranked: np.ndarray, within: Within, seed: int) -> dict[str, np.ndarray]:
    """Split the row numbers `ranked` into groups that are ranked separately: name -> rows, in the same order."""
    if within == "all":
        return {"all": ranked}
    numbers: dict[str, int] = {}  # in the order in which they are met
    if within == "cluster":
        if table.prompt_states is None:
            raise ValueError(
                "within cluster: these scores have no prompts' states, from before they were kept; delete scores.parquet and "
                "scores.parts and run the same `jsfdd score` again"
            )
        ranked = _by_id(table, ranked)  # so that the clusters do not depend on the order of the data
        of_row = cluster_prompts(table.prompt_states[ranked], seed)
        numbers = {f"cluster {number}": number for number in range(max(of_row) + 1)}
    else:
        of_row = np.fromiter((numbers.setdefault(table.sources[row], len(numbers)) for row in ranked), np.int64, len(ranked))
    grouped = ranked[np.argsort(of_row, kind="stable")]
    groups = dict(zip(numbers, np.split(grouped, np.cumsum(np.bincount(of_row))[:-1])))
    return groups if within == "cluster" else {name: groups[name] for name in sorted(groups)}


def _by_id(table: ScoreTable, rows: np.ndarray) -> np.ndarray:
    """Row numbers in the order of their ids. Arrow compares UTF-8, which has the order of Python's strings."""
    import pyarrow
    import pyarrow.compute

    ids = pyarrow.array([table.ids[row] for row in rows], pyarrow.large_string())
    return rows[pyarrow.compute.sort_indices(ids).to_numpy()]


def _first(table: ScoreTable, rows: np.ndarray, keys: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """Positions in `rows` of the `count` smallest keys, in no order but for the last one, which comes second as well.

    Among equal keys smaller ids come first. Only the rows at the cut need their ids compared: to sort ten million strings takes
    gigabytes.
    """
    cut = np.partition(keys, count - 1)[count - 1]  # of a copy, which goes at once
    below, at_cut = np.flatnonzero(keys < cut), np.flatnonzero(keys == cut)
    at_cut = sorted(at_cut.tolist(), key=lambda i: table.ids[rows[i]])[: count - len(below)]
    return np.concatenate([below, at_cut]).astype(np.int64), at_cut[-1]


def _scores(table: ScoreTable, metric: str, rows: np.ndarray, seed: int) -> Float[np.ndarray, " rows"]:
    if metric == "random":
        return np.fromiter((random_score(seed, table.ids[row]) for row in rows), np.float64, len(rows))
    return table[metric][rows]


def _ascending(metric: str, scores):
    """Scores with their sign set so that the sample kept first has the smallest."""
    return -scores if METRICS[metric].keep == "large" else scores


def _digest(table: ScoreTable) -> str:
    """SHA-256 of the ids, counts and scores."""
    sha = hashlib.sha256()
    for begin in range(0, len(table.ids), _ROWS):  # all ids as one text would be hundreds of megabytes
        sha.update(("\0" * (begin > 0) + "\0".join(table.ids[begin : begin + _ROWS])).encode())
    for values in (table.num_tokens, *table.metrics.values()):
        sha.update(np.ascontiguousarray(values).tobytes())
    return sha.hexdigest()


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
