"""What each arm kept and dropped of every source or cluster, with examples, for the report: the content of groups.json.

[{"name": "cluster 3", "size": 41, "sources": {"maths": 38, "code": 3}, "kept": {"flatness": 20, "random": 22},
  "arm": "flatness", "kept_examples": [{"id": …, "flatness": …, "prompt": …, "answer": …}, …], "dropped_examples": […]}]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jsfdd.base.records import Sample
    from jsfdd.commands.inputs import Loaded
    from jsfdd.scoring.table import ScoreTable
    from jsfdd.selection.sfdd import Selection

_MAX_TEXT = 200  # characters


def kept_and_dropped(loaded: Loaded, table: ScoreTable, selections: Mapping[str, Selection]) -> list[dict]:
    """Describe the groups within which the arms' samples were ranked, the largest first; none if every arm kept everything.

    Examples are of the first arm that a metric selected, or else of `random`.
    """
    from jsfdd.selection.sfdd import strata_of

    choosing = [arm for arm in selections if arm not in ("full", "random")] or [arm for arm in selections if arm != "full"]
    if not choosing:
        return []
    arm = choosing[0]
    kept = {name: set(selection.ids) for name, selection in selections.items()}
    examples = _Examples(loaded.samples, loaded.target.tokenizer, dict(zip(table.ids, table["flatness"].tolist(), strict=True)))
    groups = []
    for name, ids in strata_of(table, selections[arm]).items():
        groups.append(
            {
                "name": name,
                "size": len(ids),
                "sources": examples.sources(ids),
                "kept": {other: len(chosen.intersection(ids)) for other, chosen in kept.items()},
                "arm": arm,
                "kept_examples": examples.extremes([i for i in ids if i in kept[arm]]),
                "dropped_examples": examples.extremes([i for i in ids if i not in kept[arm]]),
            }
        )
    return sorted(groups, key=lambda group: -group["size"])


class _Examples:
    """Samples by id, in words."""

    def __init__(self, samples: Sequence[Sample], tokenizer, flatness: Mapping[str, float]):
        self._by_id = {sample.id: sample for sample in samples}
        self._texts, self._flatness = _Texts(samples, tokenizer), flatness

    def sources(self, ids: Sequence[str]) -> dict[str, int]:
        """How many have which source, the most frequent first."""
        return dict(Counter(self._by_id[i].source for i in ids).most_common())

    def extremes(self, ids: Sequence[str]) -> list[dict]:
        """The flattest of these samples and the least flat: on either side of the cut, and the farthest from it."""
        ranked = sorted(ids, key=lambda i: (-self._flatness[i], i))
        chosen = dict.fromkeys([ranked[0], ranked[-1]] if ranked else [])
        return [
            {"id": i, "source": self._by_id[i].source, "flatness": self._flatness[i]} | self._texts.excerpts(self._by_id[i])
            for i in chosen
        ]


class _Texts:
    """Texts of samples, without the tokens that the template puts around every prompt: those that all prompts begin with and
    those that all end with."""

    def __init__(self, samples: Sequence[Sample], tokenizer):
        prompts = [_prompt(sample) for sample in samples]
        self._tokenizer, alone = tokenizer, len(prompts) < 2
        self._before = 0 if alone else _common(prompts)
        self._after = 0 if alone else _common([prompt[self._before :][::-1] for prompt in prompts])

    def excerpts(self, sample: Sample) -> dict[str, str]:
        """The prompt and the answer, cut to a few lines."""
        prompt = _prompt(sample)
        answer = sample.tokens[sample.assistant_mask]
        return {"prompt": self._text(prompt[self._before : len(prompt) - self._after]), "answer": self._text(answer)}

    def _text(self, tokens: np.ndarray) -> str:
        text = " ".join(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True).split())
        return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def _prompt(sample: Sample) -> np.ndarray:
    """The tokens before the first answer."""
    return sample.tokens[: int(np.argmax(sample.assistant_mask))]


def _common(rows: Sequence[np.ndarray]) -> int:
    """How many tokens all rows begin with."""
    shortest = min(len(row) for row in rows)
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return int(np.argmin(same)) if not same.all() else shortest
