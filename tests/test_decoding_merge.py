"""Merged trees: a literal one, a twin with dicts, losslessness, and what a merge that leaves twins in would break."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_tokens import TRIALS, deviation, joint_of_trials

from jsfdd.decoding.merge import merge
from jsfdd.decoding.tree import Tree, ancestors_of, walk


def _tree(paths, root=0):
    """The tree of these paths, in this order, as one row."""
    order = [(), *paths]
    parents = jnp.array([[0, *(order.index(path[:-1]) for path in paths)]], jnp.int32)
    tokens = jnp.array([[root, *(path[-1] for path in paths)]], jnp.int32)
    depths = jnp.array([[0, *map(len, paths)]], jnp.int32)
    return Tree(tokens, parents, depths, ancestors_of(parents, max(map(len, paths))))


def _merge(*proposed, budget):
    """Of one row: {path: probability} of each draft merged into (tree, proposers)."""
    trees = [_tree(list(each)) for each in proposed]
    probs = [jnp.array([[1.0, *each.values()]], jnp.float32) for each in proposed]
    depth = max(len(path) for each in proposed for path in each)
    return jax.jit(merge, static_argnums=(2, 3))(trees, probs, depth, budget)


def _paths(tree, row=0):
    """{number: path} of the nodes of a tree that hold something."""
    paths = {}
    for number, (token, parent) in enumerate(zip(np.asarray(tree.tokens[row]), np.asarray(tree.parents[row]))):
        if number == 0 or token >= 0:
            assert number == 0 or parent < number
            paths[number] = (*paths[parent], int(token)) if number else ()
    return paths


FIRST = {(1,): 0.6, (2,): 0.3, (1, 3): 0.5, (1, 3, 4): 0.1}
SECOND = {(2,): 0.5, (1,): 0.4, (2, 5): 0.45, (1, 3): 0.2, (1, 4): 0.1}


def test_a_literal_merge():
    """Both have 1, 2 and 1 3; the means are 1: 0.5, 2: 0.4, 1 3: 0.35, 2 5: 0.225, and 0.05 for the two others."""
    tree, proposers = _merge(FIRST, SECOND, budget=4)
    assert tree.tokens.tolist() == [[0, 1, 2, 3, 5]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 2]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
    assert proposers.tolist() == [[0, 0, 1, 0, 1]]
    assert tree.ancestors[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


def test_a_budget_for_all_keeps_all_and_leaves_places_empty():
    for budget in (6, 8):
        tree, _ = _merge(FIRST, SECOND, budget=budget)
        assert set(_paths(tree).values()) == {(), *FIRST, *SECOND}
        empty = np.flatnonzero(np.asarray(tree.tokens[0]) < 0)
        assert len(empty) == budget - 6 and np.array_equal(tree.parents[0, empty], empty)
        assert np.array_equal(np.asarray(tree.ancestors[0])[:, empty], np.eye(budget + 1, dtype=bool)[:, empty])


def _random_drafts(rng, drafts):
    """{path: probability} of trees that drafts of one small vocabulary grow, best paths first."""
    proposed = []
    for _ in range(drafts):
        q = rng.dirichlet(np.full(5, 0.5), (4, 5)).astype(np.float32)
        level, paths = {(): np.float32(1)}, {}
        for depth in range(3):
            below = {(*path, x): p * q[depth, path[-1] if path else 0, x] for path, p in level.items() for x in range(5)}
            level = dict(sorted(below.items(), key=lambda item: -item[1])[:4])
            paths |= below
        proposed.append(dict(sorted(paths.items(), key=lambda item: -item[1])[:9]))
    return proposed


@pytest.mark.parametrize("drafts", [2, 3])
def test_merging_is_its_definition(drafts):
    """The twin in dicts: the mean over drafts of each path's probability, 0 where a draft lacks it; the best nine stay."""
    rng = np.random.default_rng(drafts)
    for _ in range(25):
        proposed = _random_drafts(rng, drafts)
        union = {path: None for each in proposed for path in each}
        each = {path: [own.get(path, np.float32(0)) for own in proposed] for path in union}
        kept = sorted(union, key=lambda path: -sum(each[path]))[:9]
        tree, proposers = _merge(*proposed, budget=9)
        paths = _paths(tree)
        assert len(paths) == 10 and set(paths.values()) == {(), *kept}, "no path twice, none of nobody's, the best of all"
        ancestors = np.asarray(tree.ancestors[0])
        for number, path in paths.items():
            assert tree.depths[0, number] == len(path)
            assert {paths[other] for other in np.flatnonzero(ancestors[number])} == {path[:n] for n in range(len(path) + 1)}
            assert number == 0 or proposers[0, number] == np.argmax(each[path])


def test_equal_trees_merge_to_themselves():
    rng = np.random.default_rng(0)
    (proposed,) = _random_drafts(rng, 1)
    tree, proposers = _merge(proposed, proposed, proposed, budget=9)
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, _tree(list(proposed)))) and not np.any(proposers)


def test_improbable_paths_keep_their_parents():
    """Probabilities that round to 0 tie, and a tie goes to the earlier node: the parent."""
    chain = {(1,): 0.0, (1, 1): 0.0, (1, 1, 1): 0.0}
    other = {(2,): 0.0, (1,): 0.0, (1, 2): 0.0}
    for budget in range(1, 6):
        _paths(_merge(chain, other, budget=budget)[0])


# --- Losslessness, and what twins break ----------------------------------------------------------------------------

MATHS, CHAT = {(1,): 0.6, (4,): 0.3, (1, 2): 0.5}, {(1,): 0.5, (0,): 0.4, (1, 5): 0.45}
MERGED = _merge(MATHS, CHAT, budget=5)[0]


def _with_twins():
    """What a merge that ignores duplicates gives: the second tree's nodes behind the first one's."""
    one, two = _tree(list(MATHS)), _tree(list(CHAT))
    size = one.tokens.shape[1]
    parents = jnp.concatenate([one.parents, jnp.where(two.parents == 0, 0, two.parents + size - 1)[:, 1:]], axis=1)
    tokens, depths = (jnp.concatenate([a, b[:, 1:]], axis=1) for a, b in ((one.tokens, two.tokens), (one.depths, two.depths)))
    return Tree(tokens, parents, depths, ancestors_of(parents, 2))


def _target():
    return np.random.default_rng(7).dirichlet(np.full(6, 0.6), 6).astype(np.float32)


def _walked(tree):
    def judge(key, p):
        def choose(level, logits):
            return jax.random.categorical(jax.random.fold_in(key, level), logits).astype(jnp.int32)

        path = walk(tree, 2, jnp.log(p)[tree.tokens], choose)
        return path.tokens[0], path.num_accepted[0]

    return judge


def _in_turn(tree):
    """As papers verify: children one after the other, each with its share of the mass that its earlier siblings left."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    children = [[i for i in range(1, len(tokens)) if parents[i] == node] for node in range(len(tokens))]

    def below(key, p, node):
        """The token after `node`, and the node that holds it; 0 if none does."""
        q, left, token, found = p[tokens[node]], 1.0, 0, 0
        others = q
        for child in children[node]:
            share = q[tokens[child]] / left
            takes = (found == 0) & (jax.random.uniform(jax.random.fold_in(key, child)) < share)
            token, found = jnp.where(takes, tokens[child], token), jnp.where(takes, child, found)
            left, others = left - q[tokens[child]], others.at[tokens[child]].set(0.0)
        other = jax.random.categorical(jax.random.fold_in(key, 100 + node), jnp.log(others))
        return jnp.where(found > 0, token, other), found

    def judge(key, p):
        first, at = below(key, p, 0)
        after = jnp.stack([jnp.stack(below(key, p, node)) for node in range(len(tokens))])
        return jnp.stack([first, after[at, 0]]), jnp.where(at > 0, 1 + (after[at, 1] > 0), 0)

    return judge


def _emit_two(judge):
    """The first two tokens of many verifications, completed by the target where only one came; and what was accepted."""
    p = jnp.asarray(_target())

    def trial(key):
        walk_key, rest_key = jax.random.split(key)
        tokens, accepted = judge(walk_key, p)
        alone = jax.random.categorical(rest_key, jnp.log(p[tokens[0]]))
        return tokens[0], jnp.where(accepted > 0, tokens[1], alone), accepted

    return joint_of_trials(trial, 6)


@functools.cache
def _emitted_by_walking():
    return _emit_two(_walked(MERGED))


@pytest.mark.slow
def test_merged_trees_are_lossless_walked_or_tried_in_turn():
    p = _target()
    expected = p[0, [1, 4, 0]].sum() + p[0, 1] * p[1, [2, 5]].sum()
    for joint, accepted in (_emitted_by_walking(), _emit_two(_in_turn(MERGED))):
        assert abs(deviation(joint, p)) < 5
        assert np.mean(accepted) == pytest.approx(expected, abs=5 * 0.7 / np.sqrt(TRIALS))


@pytest.mark.slow
def test_twins_cost_what_hangs_below_them():
    """The walk goes to the first twin. What the second draft proposed below the other is lost, and the text is not."""
    p, twins = _target(), _with_twins()
    joint, accepted = _emit_two(_walked(twins))
    assert abs(deviation(joint, p)) < 5
    lost = float(p[0, 1] * p[1, 5])
    right = _emitted_by_walking()[1]
    assert np.mean(right) - np.mean(accepted) == pytest.approx(lost, abs=5 * np.sqrt(lost / TRIALS)) and lost > 0.05
    assert twins.tokens.shape[1] == MERGED.tokens.shape[1] + 1, "and one place more was verified"


@pytest.mark.slow
def test_twins_tried_in_turn_bias_the_text():
    """Each twin takes its mass anew, so later siblings get more of what is left than is theirs."""
    assert deviation(_emit_two(_in_turn(_with_twins()))[0], _target()) > 20
