"""Confidence against acceptance: closed forms, the definitions written out, and predictions that must be exact."""

import numpy as np
import pytest
from confidence import (
    DraftTokens,
    auroc,
    calibration_error,
    expected_tau,
    figures,
    measured_tau,
    predicted_tau,
    proposed,
    reliability,
    rows_of,
    thresholds,
)

from jsfdd.base.records import Sample
from jsfdd.evaluation.intervals import interval, resample_times
from jsfdd.evaluation.replay import Judged, Recorded, walk_text


def steps(accepted, probability, prompt):
    """`DraftTokens` of steps, [n, G] each and [n], none of which is cut off."""
    n, depth = accepted.shape
    reached = np.concatenate([np.ones((n, 1)), np.cumprod(accepted, axis=1)[:, :-1]], axis=1)
    depths, prompts = np.broadcast_to(np.arange(1, depth + 1), (n, depth)), np.broadcast_to(prompt[:, None], (n, depth))
    path = np.cumprod(probability, axis=1)
    return DraftTokens(*(field.ravel() for field in (accepted, probability, 1 - probability, reached, path, depths, prompts)))


def single(accepted, probability, prompt=None):
    """Steps of one draft token."""
    accepted, probability = np.asarray(accepted, float), np.asarray(probability, float)
    return steps(accepted[:, None], probability[:, None], np.arange(len(accepted)) if prompt is None else prompt)


def calibrated(n=60_000, prompts=150, seed=0):
    """Tokens of any confidence from 0 to 1, accepted just as often as that."""
    random = np.random.default_rng(seed)
    probability = random.random(n)
    return single(random.random(n) < probability, probability, random.integers(0, prompts, n))


def test_a_calibrated_draft_is_found_to_be_one():
    drafted = calibrated()
    bins = reliability(drafted, drafted.probability, seed=0)
    assert len(bins) == 10 and sum(bin_.count for bin_ in bins) == 60_000
    # 6000 a bin: the standard error is at most 0.0065, and ten bins must lie within four.
    assert all(abs(bin_.accepted - bin_.confidence) < 0.026 for bin_ in bins)
    assert all(abs(bin_.confidence - (i + 0.5) / 10) < 0.01 for i, bin_ in enumerate(bins))
    assert all(bin_.accepted_low < bin_.accepted < bin_.accepted_high < bin_.accepted_low + 0.04 for bin_ in bins)
    assert calibration_error(bins) < 0.013
    # Densities of accepted and refused are 2c and 2(1 − c): ∫ 2c ∫₀ᶜ 2(1 − b) db dc = 5/6.
    area = auroc(drafted, drafted.probability, seed=0)
    assert area["auroc"] == pytest.approx(5 / 6, abs=0.008)
    assert area["auroc_low"] < area["auroc"] < area["auroc_high"] < area["auroc_low"] + 0.02


def test_what_is_not_calibrated_is_off_by_as_much():
    drafted = single([1, 0] * 50 + [1, 1, 0, 0, 0] * 40, [0.7] * 100 + [1.0] * 200)
    bins = reliability(drafted, drafted.probability, seed=0)
    assert [(bin_.count, bin_.confidence, bin_.accepted) for bin_ in bins] == [
        (100, pytest.approx(0.7), 0.5), (200, 1.0, pytest.approx(0.4)),
    ]  # fmt: skip
    assert calibration_error(bins) == pytest.approx((0.2 * 100 + 0.6 * 200) / 300)


def area_by_definition(confidence, right, wrong):
    """All pairs of an accepted token and a refused one, written out."""
    won = (confidence[:, None] > confidence[None]) + 0.5 * (confidence[:, None] == confidence[None])
    return np.sum(won * right[:, None] * wrong[None]) / (right.sum() * wrong.sum())


def ragged(seed, whole):
    """Three-deep steps of eight prompts with many ties; accepted or not, or with a chance."""
    random = np.random.default_rng(seed)
    accepted, probability = random.random((90, 3)), random.integers(1, 6, (90, 3)) / 5
    return steps(np.round(accepted) if whole else accepted, probability, random.integers(0, 8, 90) * 3)


@pytest.mark.parametrize("whole", [True, False])
def test_auroc_and_its_interval_are_the_definitions(whole):
    drafted = ragged(0, whole)
    right, wrong = drafted.reached * drafted.accepted, drafted.reached * (1 - drafted.accepted)
    result = auroc(drafted, drafted.probability, seed=3)
    assert result["auroc"] == pytest.approx(area_by_definition(drafted.probability, right, wrong))
    _, row = np.unique(drafted.prompt, return_inverse=True)
    resampled = [
        area_by_definition(drafted.probability, right * times[row], wrong * times[row])
        for times in resample_times(row.max() + 1, 3)
    ]
    assert (result["auroc_low"], result["auroc_high"]) == pytest.approx(interval(np.array(resampled)))
    assert auroc(drafted, -drafted.probability, seed=3)["auroc"] == pytest.approx(1 - result["auroc"])
    assert auroc(drafted, np.ones(len(drafted.path)), seed=3)["auroc"] == pytest.approx(0.5)


def test_auroc_does_not_exist_where_all_are_accepted():
    drafted = single([1, 1, 1], [0.2, 0.5, 0.9])
    assert set(auroc(drafted, drafted.probability, seed=0).values()) == {None}
    assert figures(drafted, seed=0)["calibration_error"] == pytest.approx((0.8 + 0.5 + 0.1) / 3)


def test_figures_are_of_what_is_reached():
    """Behind a refused token nothing is looked at, so what stands there must not matter."""
    drafted = ragged(1, whole=True)
    hidden = drafted.reached == 0
    assert 20 < hidden.sum() < 200
    changed = drafted._replace(**{
        name: np.where(hidden, 1 - getattr(drafted, name), getattr(drafted, name))
        for name in ("accepted", "probability", "entropy")
    })  # fmt: skip
    result = figures(drafted, seed=0)
    assert result == figures(changed, seed=0) == figures(rows_of(drafted, ~hidden), seed=0)
    assert result["count"] == (~hidden).sum() and result["accepted"] == drafted.accepted[~hidden].mean()
    assert result["auroc_entropy"] == pytest.approx(result["auroc"])  # entropies here are 1 − probabilities


def test_tau_is_the_tokens_of_steps():
    accepted = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]], float)
    drafted = steps(accepted, np.full(accepted.shape, 0.5), np.arange(4))
    assert measured_tau(drafted, seed=0)["tau"] == np.mean([3, 1, 2, 4])
    assert expected_tau(drafted, seed=0)["tau"] == 1 + 0.5 + 0.25 + 0.125
    result = measured_tau(drafted, seed=0)
    assert 1 <= result["tau_low"] < result["tau"] < result["tau_high"] <= 4


def workload(seed, sure, n=500, noise=0.0):
    """Steps whose tokens are accepted where the path's probability exceeds 0.3, but for noise; `sure`: how confident it is."""
    random = np.random.default_rng(seed)
    probability = random.beta(sure, 1, (n, 3))
    path = np.cumprod(probability, axis=1)
    accepted = path + noise * random.normal(size=path.shape) > 0.3
    return steps(accepted.astype(float), probability, random.integers(0, 25, n))


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_thresholds_are_exact_where_they_were_found(noise):
    drafted = workload(0, sure=2, noise=noise)
    predicted, measured = predicted_tau(drafted, thresholds(drafted), seed=0), measured_tau(drafted, seed=0)
    assert predicted["tau"] == pytest.approx(measured["tau"]) and 1.2 < measured["tau"] < 3.8
    assert expected_tau(drafted, seed=0)["tau"] != pytest.approx(measured["tau"], abs=0.05)


def test_tau_of_another_workload_is_predicted_without_its_labels():
    """Where acceptance is a function of confidence, almost exactly, however much more confident the draft is there."""
    limits = thresholds(workload(0, sure=2))
    easy, hard = workload(1, sure=6), workload(2, sure=0.7)
    for drafted in (easy, hard):
        predicted = predicted_tau(drafted, limits, seed=0)
        assert predicted["tau"] == pytest.approx(measured_tau(drafted, seed=0)["tau"], abs=0.03)
        blind = drafted._replace(accepted=np.zeros_like(drafted.accepted), reached=np.zeros_like(drafted.reached))
        assert predicted_tau(blind, limits, seed=0) == predicted
    assert measured_tau(easy, seed=0)["tau"] > measured_tau(hard, seed=0)["tau"] + 1


def test_a_depth_at_which_nothing_is_accepted_has_no_threshold():
    accepted = np.array([[1, 0], [1, 0], [0, 0]], float)
    drafted = steps(accepted, np.array([[0.9, 0.9], [0.8, 0.9], [0.3, 0.9]]), np.arange(3))
    assert thresholds(drafted).tolist() == [0.8, np.inf]
    assert predicted_tau(drafted, thresholds(drafted), seed=0)["tau"] == pytest.approx(1 + 2 / 3)


def recorded_texts(seed=0, depth=3, max_new_tokens=9):
    """An answer that stops early, one that stops on the way, one cut at the limit, and one of a single token; two prompts."""
    random = np.random.default_rng(seed)
    samples, judged = [], []
    for number, (start, answered) in enumerate([(4, 5), (3, 10), (6, max_new_tokens + depth), (2, 1)]):
        size = start + answered
        samples.append(Sample(f"s{number}", "s", np.ones(size, np.int32), np.arange(size) >= start))
        if answered < max_new_tokens + depth:
            samples[-1].tokens[-1] = 0  # the stopping token
        accept = (random.random((depth, size)) < 0.7).astype(np.float32)
        judged.append(Judged(accept, *random.random((2, depth, size)).astype(np.float32)))
    return Recorded(samples, np.array([0, 0, 1, 1]), 0.0, max_new_tokens, depth, (0,)), judged


def test_proposed_tokens_are_those_of_the_walk():
    """A walk that may take one step alone, begun at every position, counts the same."""
    recorded, judged = recorded_texts()
    drafted = proposed(recorded, judged)
    accepted, reached, begun = np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2)
    for sample, prompt, judgement in zip(recorded.samples, recorded.prompts, judged):
        start = int(np.argmax(sample.assistant_mask))
        stops = sample.tokens[start:] == 0
        for n in range(1, min(recorded.max_new_tokens, len(stops))):
            _, one_reached, one_accepted = walk_text(judgement.accept, start + n - 1, stops[n - 1 :], max_new_tokens=2)
            reached[prompt] += one_reached
            accepted[prompt] += one_accepted
            begun[prompt] += 1
    for prompt in (0, 1):
        for depth in (1, 2, 3):
            chosen = (drafted.prompt == prompt) & (drafted.depth == depth)
            assert drafted.reached[chosen].sum() == pytest.approx(reached[prompt, depth - 1])
            assert np.sum((drafted.reached * drafted.accepted)[chosen]) == pytest.approx(accepted[prompt, depth - 1])
    assert measured_tau(drafted, seed=0)["tau"] == pytest.approx(1 + accepted.sum() / begun.sum())


def test_a_path_is_that_of_its_own_step():
    recorded, judged = recorded_texts()
    drafted = proposed(recorded, judged)
    expected = []
    for sample, judgement in zip(recorded.samples, judged):
        start, length = int(np.argmax(sample.assistant_mask)), int(sample.assistant_mask.sum())
        for begin in range(1, min(recorded.max_new_tokens, length)):
            path = 1.0
            for i in range(min(3, length - begin)):
                probability, entropy = (field[i, start + begin + i - 2] for field in judgement[1:])
                path *= float(probability)
                expected.append((path, probability, entropy, i + 1))
    columns = np.stack([drafted.path, drafted.probability, drafted.entropy, drafted.depth], axis=1)
    np.testing.assert_allclose(columns, np.array(expected), rtol=1e-6)
