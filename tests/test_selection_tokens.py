"""Token selection against the ranking written out, and its refusals."""

import numpy as np
import pytest

from jsfdd.base.records import Sample
from jsfdd.scoring.table import TokenRow
from jsfdd.selection.tokens import token_weights
from jsfdd.selection.vocabulary import frequent_tokens

FLATNESS = {"a": [0.1, 0.5, 0.3, 0.0], "b": [0.0, 0.3, 0.9, 0.3, 0.0]}
COUNTED = {"a": [True, True, True, False], "b": [False, True, True, True, False]}


def sample(name):
    """A sample whose `counted` is COUNTED[name]."""
    mask = np.array(COUNTED[name])
    mask[1:] |= mask[:-1].copy()
    found = Sample(name, "s", np.arange(len(mask), dtype=np.int32), mask)
    assert found.counted.tolist() == COUNTED[name]
    return found


def row(name):
    flatness = np.array(FLATNESS[name])
    return TokenRow(np.array(COUNTED[name]), flatness, 1 - flatness)


SAMPLES, SCORES = [sample("a"), sample("b")], {"a": row("a"), "b": row("b")}


def weights(metric="flatness", retain_ratio=0.5, weighting="hard", seed=0, samples=SAMPLES, scores=SCORES):
    return token_weights(samples, scores, metric=metric, retain_ratio=retain_ratio, weighting=weighting, seed=seed)


def test_the_flattest_tokens_of_all_samples_stay():
    found = weights()  # 3 of 6: 0.9, 0.5, and of the three that tie at 0.3 the first
    assert {name: value.tolist() for name, value in found.items()} == {"a": [0, 1, 1, 0], "b": [0, 0, 1, 0, 0]}
    assert all(value.dtype == np.float32 for value in found.values())
    assert {name: value.tolist() for name, value in weights("entropy", 1 / 6).items()} == {"a": [1, 0, 0, 0], "b": [0] * 5}
    assert sum(value.sum() for value in weights(retain_ratio=0.01).values()) == 1


def test_all_tokens_stay_at_ratio_one():
    for name, value in weights(retain_ratio=1.0).items():
        np.testing.assert_array_equal(value, COUNTED[name])


def test_soft_weights_are_in_proportion_and_one_on_average():
    found = weights(retain_ratio=5 / 6, weighting="soft")
    kept = np.concatenate([found["a"], found["b"]])
    assert np.count_nonzero(kept) == 5 and kept[kept > 0].mean() == pytest.approx(1)
    assert found["b"][2] / found["a"][2] == pytest.approx(3) and found["a"][0] == 0


def test_random_does_not_depend_on_the_other_samples_but_on_the_seed():
    names = [f"s{i}" for i in range(40)]
    mask = np.ones(30, bool)
    samples = [Sample(name, "s", np.arange(30, dtype=np.int32), mask) for name in names]
    found = weights("random", 0.5, samples=samples)
    total = sum(value.sum() for value in found.values())
    assert total == round(0.5 * 40 * 29)
    assert weights("random", 0.5, samples=samples[:1])[names[0]].sum() == round(0.5 * 29)
    other = weights("random", 0.5, seed=1, samples=samples)
    assert any(not np.array_equal(found[name], other[name]) for name in names)
    alone, ranked = weights("random", 0.9, samples=samples[:1])[names[0]], found[names[0]]
    assert np.all(alone[ranked > 0] == 1) or ranked.sum() > alone.sum()


def test_frequent_tokens_are_those_that_a_draft_could_have_proposed():
    tokens = np.array([9, 9, 9, 1, 1, 4, 4, 2, 9], np.int32)
    mask = np.array([False, False, True, True, True, True, True, True, False])
    answer = Sample("a", "s", tokens, mask)  # proposed could be 1, 1, 4, 4, 2; the first 9 of the answer is the target's
    assert frequent_tokens([answer], 1, 10) == (1,)  # 1 and 4 both occur twice
    assert frequent_tokens([answer], 3, 10) == (1, 2, 4)
    assert frequent_tokens([answer], 5, 10) == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="--draft-vocab: 11 exceeds"):
        frequent_tokens([answer], 11, 10)


def test_scores_of_other_samples_or_tokens_are_refused():
    with pytest.raises(ValueError, match="sample b has no token scores.*--per-token"):
        weights(scores={"a": row("a")})
    other = TokenRow(np.array([True] * 4), np.zeros(4), np.zeros(4))
    with pytest.raises(ValueError, match="sample a: its token scores are of other tokens"):
        weights(scores=SCORES | {"a": other})
