"""Mixtures: exact shares, one sequence for all sizes, nothing twice, and what they refuse."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsfdd.base.records import Sample
from jsfdd.selection.mixture import contents, in_words, mixture


def sample(name, source, counted=5):
    return Sample(name, source, np.zeros(counted + 3, np.int32), np.arange(counted + 3) >= 2)


def of_sources(**counts):
    """Samples of growing length, the sources in turn."""
    made = [[sample(f"{source}-{i}", source, 1 + i % 7) for i in range(count)] for source, count in counts.items()]
    return [each for group in itertools.zip_longest(*made) for each in group if each is not None]


SAMPLES = of_sources(chat=60, code=30, math=20)


def mix(weights, total=None, unit="samples", seed=0, samples=SAMPLES):
    return mixture(samples, weights, unit, total, seed)


def counts(found):
    return {source: numbers["samples"] for source, numbers in contents(found).items()}


def ids(found):
    return [each.id for each in found]


def by_hand(weights, total):
    """Sainte-Laguë's rule as it is told: each seat to the source with the largest weight / (2 seats + 1)."""
    seats = dict.fromkeys(sorted(weights), 0)
    for _ in range(total):
        # To the first of equals, which in float means almost equal.
        quotients = {source: weights[source] / (2 * count + 1) for source, count in seats.items()}
        seats[next(s for s in quotients if quotients[s] >= max(quotients.values()) * (1 - 1e-12))] += 1
    return {source: count for source, count in seats.items() if count}


def test_counts_are_the_shares():
    assert counts(mix({"chat": 0.5, "math": 0.5}, 30)) == {"chat": 15, "math": 15}
    assert counts(mix({"chat": 5, "code": 3, "math": 2}, 100)) == {"chat": 50, "code": 30, "math": 20}
    assert counts(mix({"math": 1}, 7)) == {"math": 7}
    for total in range(1, 60):
        weights = {"chat": 0.55, "code": 0.3, "math": 0.15}
        assert counts(mix(weights, total)) == by_hand(weights, total)


def test_without_a_total_the_scarcest_source_is_used_up():
    assert counts(mix({"chat": 0.5, "math": 0.5})) == {"chat": 20, "math": 20}
    assert counts(mix({"chat": 3, "math": 1})) == {"chat": 60, "math": 20}
    assert counts(mix({"chat": 6, "math": 1})) == {"chat": 60, "math": 10}
    assert ids(mix({"math": 0.3})) == [each.id for each in SAMPLES if each.source == "math"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=25), min_size=2, max_size=4),
    st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    st.floats(0.1, 1),
)
def test_token_shares_are_within_one_sample(lengths, weights, part):
    """Of each source: within half its samples of one common size, at every total; and no more tokens than asked for."""
    weights = dict(zip("abcd"[: len(lengths)], weights))
    samples = [sample(f"{s}-{i}", s, n) for s, own in zip(weights, lengths) for i, n in enumerate(own)]
    whole = mix(weights, unit="tokens", samples=samples)
    largest = sum(each["counted_tokens"] for each in contents(whole).values())
    total = max(int(part * largest), max(max(own) for own in lengths))
    if total > largest:
        return
    found = contents(mix(weights, total, "tokens", samples=samples))
    tokens = {s: found[s]["counted_tokens"] if s in found else 0 for s in weights}
    assert sum(tokens.values()) <= total
    slack = {s: max(own) / 2 for s, own in zip(weights, lengths)}
    lowest = max((tokens[s] - slack[s]) / weights[s] for s in weights)
    highest = min((tokens[s] + slack[s]) / weights[s] for s in weights)
    assert lowest <= highest * (1 + 1e-9)
    # The sequence is broken off at the first sample that does not fit.
    assert total - sum(tokens.values()) <= max(max(own) for own in lengths) or sum(tokens.values()) == largest


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_a_larger_mixture_contains_a_smaller(unit):
    weights = {"chat": 0.2, "code": 0.5, "math": 0.3}
    found = [set(ids(mix(weights, total, unit))) for total in range(7, 50)]
    assert all(small <= large for small, large in itertools.pairwise(found)) and len(found[0]) < len(found[-1])


def test_the_seed_chooses_and_the_order_does_not():
    weights = {"chat": 0.5, "math": 0.5}
    first = mix(weights, 21)
    assert ids(first) == [each.id for each in SAMPLES if each.id in set(ids(first))], "not in the order of the data"
    turned = mix({"math": 0.5, "chat": 0.5}, 21, samples=SAMPLES[::-1])
    assert ids(turned) == ids(first)[::-1]
    other = mix(weights, 21, seed=1)
    assert counts(other) == counts(first) and set(ids(other)) != set(ids(first))
    assert len(set(ids(first))) == 21, "a sample was taken twice"


def test_a_sources_order_is_its_own():
    """What of a source comes first depends neither on the others nor on the weights."""
    math = [set(ids(mix({"math": 1}, count))) for count in range(1, 21)]
    for weights, total in (({"math": 1, "chat": 1}, 16), ({"math": 1, "code": 3}, 28)):
        taken = {name for name in ids(mix(weights, total)) if name.startswith("math")}
        assert taken == math[len(taken) - 1]


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"no sample .* 'maths'; choose from chat \(60\), code \(30\), math \(20\)"):
        mix({"chat": 0.5, "maths": 0.5})
    message = "--mix-total 41: .* at most 40 samples: math is to be 0.5 of it and has 20 .* take --mix-total 40 or less"
    with pytest.raises(ValueError, match=message):
        mix({"chat": 1, "math": 1}, 41)
    tokens = sum(1 + i % 7 for i in range(20))
    with pytest.raises(ValueError, match=rf"at most {tokens} tokens: math is to be 1 of it and has {tokens} to train on"):
        mix({"math": 1}, tokens + 1, "tokens")
    with pytest.raises(ValueError, match="--mix-total 2: the mixture's first sample alone has 5 tokens"):
        mix({"a": 1}, 2, "tokens", samples=[sample("x", "a")])


def test_contents_in_words():
    found = contents([sample("x", "b", 2), sample("y", "a", 3), sample("z", "b", 4)])
    assert found == {"a": {"samples": 1, "counted_tokens": 3}, "b": {"samples": 2, "counted_tokens": 6}}
    assert in_words(found) == "samples: 1 of a (3 counted tokens), 2 of b (6 counted tokens)"
