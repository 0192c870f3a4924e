"""Sample-level flatness-based dataset distillation (arXiv 2601.18902): keep the samples with the flattest targets.

    selection = select(read_scores(path), metric="flatness", retain_ratio=0.5)
    kept = selected_samples(selection, samples)

The paper's baselines are other metrics of the same selection; `random` is the control.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from jsfdd.base.files import differences, sha256, write_json
from jsfdd.base.records import Sample
from jsfdd.scoring.metrics import Metric
from jsfdd.scoring.table import ScoreTable

Unit = Literal["sample", "batch"]
Within = Literal["all", "source"]

# Every metric keeps the end at which the target is uncertain: there the draft has the most to learn.
_KEPT_END = {
    "flatness": "large",
    "flatness_median": "large",
    "entropy": "large",
    "top1": "small",
    "margin": "small",
    "energy": "large",  # energy is −logsumexp: large means that no token has much evidence
    "ppl": "large",
    "random": "large",  # of numbers that mean nothing
}
_SAMPLES_PER_BATCH = 4  # of the paper's code, which scores and keeps its scoring batches as wholes
_REMEDY = "select again with `jsfdd select`"


@dataclasses.dataclass(frozen=True)
class Selection:
    """What was kept, and why.

    Attributes:
      ids: samples that stay, in the order of the data.
      dropped: samples without a counted token, in the order of the data: they could teach nothing and were not ranked.
      metric, retain_ratio, seed, unit, within: as asked for; seed only matters to the metric random.
      thresholds: source (or "all") -> score of the last that was kept of it; lower ones went (higher ones for top1 and margin).
      inputs: identity of the scores, and their hash.
    """

    ids: tuple[str, ...]
    dropped: tuple[str, ...]
    metric: Metric
    retain_ratio: float
    seed: int
    unit: Unit
    within: Within
    thresholds: dict[str, float]
    inputs: dict


def select(
    table: ScoreTable,
    metric: Metric,
    retain_ratio: float = 0.5,
    seed: int = 0,
    unit: Unit = "sample",
    within: Within = "all",
) -> Selection:
    """Keep the k = max(1, round(retain_ratio·N)) most uncertain of the N samples that have a counted token.

    Half a sample rounds up, always (Python's round would go to the even neighbour). Of equal scores the smaller id is
    kept first. The choice does not depend on the order of the data, that of `random` only on the seed and the ids.

    Args:
      table: of all samples.
      metric: what ranks them.
      retain_ratio: in (0, 1].
      seed: of the metric random.
      unit: "batch" keeps or drops four samples at a time, neighbours in the order of their ids, ranked by the mean over
        all their counted tokens: the granularity of the paper's code, for parity only.
      within: "source" ranks each source's samples among themselves and keeps the share of each, at least one: not in the
        paper, whose metrics all choose sources before they choose samples (experiments/013 and 014).

    Raises:
      ValueError: an unknown metric, unit or `within`, a ratio out of range, no sample to rank, or a metric that a batch
        has not.
    """
    _check_options(metric, retain_ratio, unit, within)
    ranked = np.flatnonzero(table.num_tokens > 0)
    if not len(ranked):
        raise ValueError("no sample has a token that counts: every answer is empty or one token long; check the data")
    ranked = np.array(sorted(ranked, key=lambda row: table.ids[row]))
    size = _SAMPLES_PER_BATCH if unit == "batch" else 1
    kept, thresholds = [], {}
    for name, rows in _strata(table, ranked, within).items():
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        scores = _group_scores(table, metric, groups, seed)
        if np.isnan(scores).any():
            broken = [table.ids[group[0]] for group, score in zip(groups, scores) if np.isnan(score)]
            raise ValueError(f"the {metric} of these samples is not a number: {_few(broken)}; score again")
        # The groups are in the order of their ids, and a stable sort leaves equal ones so.
        order = np.argsort(-scores if _KEPT_END[metric] == "large" else scores, kind="stable")
        order = order[: how_many(retain_ratio, len(groups))]
        kept += [groups[g] for g in order]
        thresholds[name] = float(scores[order[-1]])
    kept = np.sort(np.concatenate(kept))
    return Selection(
        ids=tuple(table.ids[i] for i in kept),
        dropped=tuple(table.ids[i] for i in np.flatnonzero(table.num_tokens == 0)),
        metric=metric,
        retain_ratio=retain_ratio,
        seed=seed,
        unit=unit,
        within=within,
        thresholds=thresholds,
        inputs={"scores": table.identity, "scores_sha256": _digest(table)},
    )


def how_many(retain_ratio: float, number: int) -> int:
    """k of `number` samples or batches: one at least, and half a sample rounds up."""
    return max(1, math.floor(retain_ratio * number + 0.5))


def place_in_order(metric: Metric, score: float, sample_id: str) -> tuple[float, str]:
    """A sample's place in the order in which `select` keeps samples: the smallest is kept first. No two are equal."""
    return (-score if _KEPT_END[metric] == "large" else score), sample_id


def random_score(seed: int, sample_id: str) -> float:
    """The metric `random` of a sample, in [0, 1): a pure function of its arguments, known before anything is scored."""
    digest = hashlib.sha256(f"jsfdd random: {seed}: {sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def selected_samples(selection: Selection, samples: Sequence[Sample]) -> list[Sample]:
    """The samples that stay, in the order of the data. ValueError names a few that the data lacks."""
    missing = sorted({*selection.ids, *selection.dropped} - {sample.id for sample in samples})
    if missing:
        raise ValueError(
            f"the data lacks {len(missing)} of the samples that the selection was made from: {_few(missing)}; give the "
            f"files that were scored, or score and {_REMEDY}"
        )
    kept = set(selection.ids)
    return [sample for sample in samples if sample.id in kept]


def write_selection(path: Path, selection: Selection) -> None:
    """Write selection.json, atomic."""
    write_json(path, dataclasses.asdict(selection))


def read_selection(path: Path) -> Selection:
    """Read selection.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not what `write_selection` writes; names file, value and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_REMEDY}, or check the path")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {_REMEDY}") from None
    kinds = {
        "ids": list, "dropped": list, "metric": str, "retain_ratio": (int, float), "seed": int, "unit": str,
        "within": str, "thresholds": dict, "inputs": dict,
    }  # fmt: skip
    if not isinstance(values, dict) or set(values) != set(kinds):
        found = ", ".join(sorted(values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path}: needs exactly {', '.join(sorted(kinds))}; found {found}; {_REMEDY}")
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise ValueError(f"{path}: {name} is {values[name]!r:.60}, of the wrong type; {_REMEDY}")
    names = values["ids"] + values["dropped"]
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"{path}: ids that are not strings: {_few(wrong)}; {_REMEDY}")
    if len(set(names)) != len(names) or not values["ids"]:
        raise ValueError(f"{path}: {'an id occurs twice' if values['ids'] else 'no id is kept'}; {_REMEDY}")
    try:
        _check_options(values["metric"], values["retain_ratio"], values["unit"], values["within"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_REMEDY}") from None
    return Selection(**{**values, "ids": tuple(values["ids"]), "dropped": tuple(values["dropped"])})


def selection_facts(path: Path, identity: dict | None) -> dict:
    """What a model card says of selection.json; JSON-ready, without the lists of ids.

    Args:
      identity: of the training run that used it, if known.

    Raises:
      FileNotFoundError, ValueError: as in `read_selection`, or it was made for another target than the run's.
    """
    selection = read_selection(path)
    if identity is not None:
        keys = ("target", "template")
        scored, trained = ({key: of.get(key) for key in keys} for of in (selection.inputs["scores"], identity))
        if changed := differences(scored, trained):
            raise ValueError(f"{path}: not the selection that the draft was trained on ({changed}); give its own --selection")
    facts = dataclasses.asdict(selection)
    return {key: facts[key] for key in ("metric", "retain_ratio", "thresholds", "within", "unit", "seed")} | {
        "kept": len(selection.ids),
        "dropped": len(selection.dropped),
        "sha256": sha256(path),
    }


def _check_options(metric: str, retain_ratio: float, unit: str, within: str) -> None:
    if metric not in _KEPT_END:
        raise ValueError(f"metric {metric!r} is unknown; choose from {', '.join(_KEPT_END)}")
    if not 0 < retain_ratio <= 1:
        raise ValueError(f"retain_ratio is {retain_ratio}, but it must be a share of the samples in (0, 1]")
    if unit not in typing.get_args(Unit):
        raise ValueError(f"unit {unit!r} is unknown; choose from {', '.join(typing.get_args(Unit))}")
    if within not in typing.get_args(Within):
        raise ValueError(f"within {within!r} is unknown; choose from {', '.join(typing.get_args(Within))}")
    if unit == "batch" and metric == "flatness_median":
        raise ValueError("a batch has a mean over its tokens but no flatness_median; use flatness, or the unit sample")


def _strata(table: ScoreTable, ranked: np.ndarray, within: Within) -> dict[str, np.ndarray]:
    """name -> those of the row numbers `ranked` that compete with each other, in the same order."""
    if within == "all":
        return {"all": ranked}
    sources = np.array([table.sources[row] for row in ranked], object)
    return {name: ranked[sources == name] for name in sorted(set(sources))}


def _group_scores(
    table: ScoreTable, metric: str, groups: Sequence[np.ndarray], seed: int
) -> Float[np.ndarray, " groups"]:
    """The metric of each group of row numbers: its mean over all counted tokens, or for random a number of its own."""
    if metric == "random":
        return np.array([random_score(seed, table.ids[group[0]]) for group in groups])
    values = getattr(table, metric)
    if all(len(group) == 1 for group in groups):
        return values[np.concatenate(groups)]
    values = np.log(values) if metric == "ppl" else values  # its logarithm is the mean nll, and means average
    means = np.array([np.average(values[group], weights=table.num_tokens[group]) for group in groups])
    return np.exp(means) if metric == "ppl" else means


def _digest(table: ScoreTable) -> str:
    """sha256 of the ids, counts and scores."""
    sha = hashlib.sha256("\0".join(table.ids).encode())
    for values in (table.num_tokens, *(getattr(table, metric) for metric in _KEPT_END if metric != "random")):
        sha.update(np.ascontiguousarray(values).tobytes())
    return sha.hexdigest()


def _few(names: Sequence) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
