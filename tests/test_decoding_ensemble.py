"""Several drafts at once: two equal ones are one, text is the target's own, and no draft loses sight of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import compiled_decoder, good_draft, toy_draft, toy_prompts, toy_target

from jsfdd.decoding.ensemble import (
    Routing,
    average_drafts,
    certainty,
    check_one_target,
    confidence,
    no_routing,
    route,
    still_needed,
)
from jsfdd.decoding.generate import make_stream, prepare_params
from jsfdd.decoding.settings import Combine, DecodeSetup, TreeShape
from jsfdd.decoding.tree import Proposals
from jsfdd.models.architecture import Rope
from jsfdd.models.draft import Draft

pytestmark = pytest.mark.slow

TREE = TreeShape(3, 3, 9)
RULES = {
    "route by entropy": Combine("route", "entropy"),
    "route prompts": Combine("route", route_steps=2),
    "merge": Combine("merge"),
}


class Models:
    """A target, a draft that is often right, one that seldom is, and the former's shape for even and for odd tokens alone."""

    def __init__(self):
        self.target, target_params = toy_target()
        self.draft, _ = toy_draft(self.target)
        self.params = prepare_params(target_params)
        self.good, self.other = good_draft(self.target, target_params), toy_draft(self.target, seed=1)[1]
        self.halves = tuple(dataclasses.replace(self.draft, vocabulary=tuple(range(odd, 64, 2))) for odd in (0, 1))

    def setup(self, *drafts, combine=None, **changes):
        values = dict(target=self.target, drafts=drafts, num_draft_tokens=3, max_new_tokens=24, tree=TREE, combine=combine)
        return DecodeSetup(**values | changes)

    def decode(self, setup, *draft_params, temperature=0.0, prompts=None):
        params = self.params._replace(drafts=draft_params)
        return compiled_decoder(setup)(params, prompts or toy_prompts(), jnp.float32(temperature))

    def plain(self, temperature):
        return self.decode(self.setup(num_draft_tokens=0, tree=None), temperature=temperature).tokens


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.mark.parametrize("combine", RULES.values(), ids=RULES)
def test_two_equal_drafts_are_one(models, combine):
    """Token for token and count for count; of equals the earlier proposes."""
    for temperature in (0.0, 0.8):
        one = models.decode(models.setup(models.draft), models.good, temperature=temperature)
        setup = models.setup(models.draft, models.draft, combine=combine)
        two = models.decode(setup, models.good, models.good, temperature=temperature)
        assert jax.tree.all(jax.tree.map(np.array_equal, one[:3], two[:3]))
        assert np.asarray(one.stats.accepted).sum() > 0
        assert np.array_equal(two.shares.offered[:, 0], TREE.nodes * one.stats.accept_counts.sum(1))
        assert np.array_equal(two.shares.accepted[:, 0], one.stats.accepted.sum(1))
        assert not np.any(two.shares.offered[:, 1]) and not np.any(two.shares.accepted[:, 1])


@pytest.mark.parametrize("combine", RULES.values(), ids=RULES)
def test_text_is_plain_decodings_whoever_proposes(models, combine):
    for temperature in (0.0, 0.8):
        setup = models.setup(models.draft, models.draft, combine=combine)
        out = models.decode(setup, models.other, models.good, temperature=temperature)
        assert np.array_equal(out.tokens, models.plain(temperature))
        assert np.all(np.asarray(out.shares.offered).sum(0) > 0)
        assert np.array_equal(out.shares.offered.sum(1), TREE.nodes * out.stats.accept_counts.sum(1))
        assert np.array_equal(out.shares.accepted.sum(1), out.stats.accepted.sum(1))


def test_drafts_with_vocabularies_of_their_own_merge(models):
    """Each is right in places where the other cannot be."""
    wide = dict(tree=TreeShape(2, 16, 100), num_draft_tokens=2)
    out = models.decode(models.setup(*models.halves, combine=Combine("merge"), **wide), models.good, models.good)
    assert np.array_equal(out.tokens, models.plain(0.0))
    assert np.all(np.asarray(out.shares.accepted).sum(0) > 0)


def test_every_cache_holds_what_its_draft_alone_would(models):
    """Whichever draft won a step, both have observed the same true pairs."""

    def decoded(*draft_params, combine=None):
        start, step = make_stream(models.setup(*[models.draft] * len(draft_params), combine=combine))
        params = models.params._replace(drafts=draft_params)
        state = start(params, toy_prompts(), jnp.float32(0))
        while not np.all(state.done):
            state, _ = step(params, state, jnp.float32(0))
        return state.draft_caches

    both = models.other, models.good
    together = decoded(*both, combine=Combine("route"))
    for cache, own in zip(together, both, strict=True):
        (expected,) = decoded(own)
        for row in range(4):
            held = min(int(cache.length[row]), int(expected.length[row]))  # a last step may overshoot by more or less
            assert held >= toy_prompts().lengths[row] + 22
            assert np.allclose(cache.k[:, row, :, :, :held], expected.k[:, row, :, :, :held], atol=1e-5)
            assert np.allclose(cache.v[:, row, :, :held], expected.v[:, row, :, :held], atol=1e-5)


# --- Routing -------------------------------------------------------------------------------------------------------


def test_confidence_is_the_mean_of_the_trees_paths():
    """The paper's rule: over the nodes that are verified, without the root; what was proposed beyond them does not count."""
    proposals = Proposals(
        tokens=jnp.array([[1, 2, 3, 4, 5, 3]], jnp.int32),
        scores=jnp.log(jnp.array([[0.6, 0.4, 0.54, 0.06, 0.2, 0.19]])),
        parents=jnp.array([[-1, -1, 0, 0, 1, 1]], jnp.int32),
    )
    assert confidence(TreeShape(2, 2, 4), proposals)[0] == pytest.approx((0.6 + 0.4 + 0.54 + 0.2) / 4, rel=1e-6)


def test_certainty_is_the_negative_entropy():
    log_probs = jnp.log(jnp.array([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    assert np.allclose(certainty(log_probs), [0.5 * np.log(0.5) + 0.5 * np.log(0.25), 0.0])


def test_routing_literal():
    """Every step its own winner; or, after two steps, the winner of their sums, whatever comes then."""
    done = jnp.array([False, False])
    steps = [[[0.2, 0.3], [0.5, 0.5]], [[0.4, 0.1], [0.1, 0.9]], [[0.1, 0.9], [0.9, 0.1]]]
    each, prompt = Combine("route"), Combine("route", route_steps=2)
    routing, won = no_routing(prompt, 2, 2), []
    for sureness in map(jnp.array, steps):
        winner, routing = route(prompt, sureness, routing, done)
        won.append(winner.tolist())
        assert route(each, sureness, None, done)[0].tolist() == np.argmax(sureness, axis=1).tolist()
    assert won == [[1, 0], [0, 1], [0, 1]]
    assert routing.steps.tolist() == [2, 2] and np.allclose(routing.sureness, [[0.6, 0.4], [0.6, 1.4]])


def test_a_draft_is_needed_while_a_row_may_still_choose_it():
    combine = Combine("route", route_steps=2)
    routing = Routing(jnp.array([[0.6, 0.4, 0.1], [0.1, 0.9, 0.2]]), jnp.array([2, 2], jnp.int32))
    assert still_needed(combine, routing, jnp.array([False, False])).tolist() == [True, True, False]
    assert still_needed(combine, routing, jnp.array([False, True])).tolist() == [True, False, False]
    undecided = routing._replace(steps=jnp.array([2, 1], jnp.int32))
    assert still_needed(combine, undecided, jnp.array([False, False])).tolist() == [True, True, True]
    assert still_needed(combine, undecided, jnp.array([False, True])).tolist() == [True, False, False]


def test_a_routed_prompt_stays_with_its_draft_and_the_other_rests(models):
    """One prompt: three steps by both, then the draft that was surest in them; the other one's cache is not touched again."""
    setup = models.setup(models.draft, models.draft, combine=Combine("route", route_steps=3))
    start, step = make_stream(setup)
    params = models.params._replace(drafts=(models.other, models.good))
    prompt = jax.tree.map(lambda x: x[1:2], toy_prompts())
    state, won, lengths = start(params, prompt, jnp.float32(0)), [], []
    while not np.all(state.done):
        state, emitted = step(params, state, jnp.float32(0))
        won.append(int(np.argmax(emitted.offered[0])))
        lengths.append([int(cache.length[0]) for cache in state.draft_caches])
    chosen = int(np.argmax(state.routing.sureness[0]))
    assert state.routing.steps.tolist() == [3] and set(won[3:]) == {chosen} and len(won) > 5
    read = np.array(lengths)
    assert np.array_equal(read[:2, 0], read[:2, 1]) and np.all(np.diff(read[:-1, chosen]) > 0)
    assert np.all(read[2:, 1 - chosen] == read[1, 1 - chosen]), "decided in the third step, it did not even observe that one"


def test_what_a_row_is_given_does_not_depend_on_the_batch(models):
    setup, both = models.setup(models.draft, models.draft, combine=RULES["route prompts"]), (models.other, models.good)
    whole = models.decode(setup, *both)
    for row in range(4):
        alone = models.decode(setup, *both, prompts=jax.tree.map(lambda x, row=row: x[row : row + 1], toy_prompts()))
        assert jax.tree.all(jax.tree.map(lambda a, b, row=row: np.array_equal(a[0], b[row]), alone, whole))


# --- Averaging and refusals ----------------------------------------------------------------------------------------


def test_averages_are_linear(models):
    one, two = Draft(models.draft, models.good), Draft(*toy_draft(models.target, seed=4))
    config, same, _ = average_drafts({"a": one, "b": two}, (1.0, 0.0))
    assert config == models.draft and jax.tree.all(jax.tree.map(np.array_equal, same, models.good))
    third = average_drafts({"a": one, "b": two, "c": one}, (0.2, -0.5, 1.3)).params
    expected = jax.tree.map(lambda a, b: 1.5 * a - 0.5 * b, one.params, two.params)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), third, expected))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"intermediate_size": 40}, "intermediate_size is 48 and 40"),
        ({"rope": Rope(5e5)}, "rope is Rope.*and Rope"),
        ({"vocab_size": 60}, "vocab_size is 64 and 60"),
    ],
)
def test_drafts_of_other_shapes_are_not_averaged(models, changes, words):
    other = Draft(*toy_draft(dataclasses.replace(models.target, **changes)))
    with pytest.raises(ValueError, match=f"drafts a and b cannot be combined: {words}"):
        average_drafts({"a": Draft(models.draft, models.good), "b": other}, (0.5, 0.5))
    if "intermediate_size" in changes:
        check_one_target({"a": models.draft, "b": other.config})  # that alone does not stop them from decoding together
    else:
        with pytest.raises(ValueError, match=words):
            check_one_target({"a": models.draft, "b": other.config})


def test_drafts_of_other_vocabularies_are_not_averaged(models):
    even, odd = (Draft(half, models.good) for half in models.halves)
    with pytest.raises(ValueError, match=r"the draft vocabulary is \(0, 2, .*… and \(1, 3, .*…"):
        average_drafts({"a": even, "b": odd}, (0.5, 0.5))


def test_setups_that_cannot_be(models):
    with pytest.raises(ValueError, match="route needs a tree: chains are drawn"):
        models.setup(*models.halves, combine=Combine("route"), tree=None)
    with pytest.raises(ValueError, match="2 drafts, but `combine` does not say"):
        models.setup(*models.halves)
    small = dataclasses.replace(models.draft, vocabulary=(1, 2))
    with pytest.raises(ValueError, match="tree's top-k 3 exceeds the draft's vocabulary of 2"):
        models.setup(models.draft, small, combine=Combine("merge"))
