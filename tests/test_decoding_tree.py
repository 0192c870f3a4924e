"""Draft trees: literal small ones, a slow twin that grows them with dicts, and losslessness by exact distributions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_target
from two_tokens import TRIALS, deviation, joint_of_trials

from jsfdd.decoding.tree import Tree, TreeShape, grow, keep_path, rerank, root_only, tree_view, walk
from jsfdd.models.attention import cached_view, empty_cache
from jsfdd.models.target import decode, hidden_states

V = 6
_decode, _hidden_states = jax.jit(decode, static_argnums=0), jax.jit(hidden_states, static_argnums=0)


def _bigram(seed=0, concentration=0.7):
    """Row x is the distribution of the token after x."""
    return np.random.default_rng(seed).dirichlet(np.full(V, concentration), V).astype(np.float32)


def _grow_bigram(shape, draft, roots):
    """Proposals of a draft that knows bigrams: its hidden state is the last token, one-hot. Also what it was shown."""
    config, _ = toy_target(num_layers=1)
    cache = empty_cache(config, len(roots), 5 + shape.draft_slots)._replace(length=jnp.arange(len(roots), dtype=jnp.int32) + 2)
    shown = []

    def forward(cache, view, hidden, tokens):
        jax.debug.callback(
            lambda *seen: shown.append([np.asarray(x) for x in seen]), cache.length, *view, hidden, tokens, ordered=True
        )
        return jax.nn.one_hot(tokens, V), cache

    def log_probs(hidden):
        return jnp.log(jnp.einsum("bnv,vw->bnw", hidden, jnp.asarray(draft)))

    grown = jax.jit(lambda hidden, cache: grow(shape, hidden, cache, forward, log_probs))
    proposals, after = grown(np.eye(V, dtype=np.float32)[roots], cache)
    jax.effects_barrier()
    assert np.array_equal(after.length, cache.length)
    return proposals, shown


def _slow_tree(shape, draft, root):
    """EAGLE-2's rule with dicts: {path: probability} of the `nodes` best proposals."""
    proposed, frontier = {}, {(): 1.0}
    for _ in range(shape.depth):
        level = {}
        for path, p in frontier.items():
            q = draft[path[-1] if path else root]
            level |= {(*path, x): p * q[x] for x in sorted(range(V), key=lambda x: -q[x])[: shape.top_k]}
        proposed |= level
        frontier = dict(sorted(level.items(), key=lambda item: -item[1])[: shape.top_k])
    return dict(sorted(proposed.items(), key=lambda item: -item[1])[: shape.nodes])


def _paths(tree, row=0):
    """The token paths of a tree's nodes, root left out."""
    paths = [()]
    for token, parent in zip(np.asarray(tree.tokens[row])[1:], np.asarray(tree.parents[row])[1:]):
        paths.append((*paths[parent], int(token)))
    return paths[1:]


@pytest.mark.parametrize("shape", [TreeShape(1, 3, 2), TreeShape(3, 2, 5), TreeShape(4, 3, 12), TreeShape(4, 1, 4)], ids=str)
def test_the_best_paths_stay(shape):
    draft, roots = _bigram(), [0, 3, 5]
    proposals, _ = _grow_bigram(shape, draft, roots)
    tree = jax.device_get(jax.jit(rerank, static_argnums=0)(shape, proposals, np.array(roots, np.int32)))
    for row, root in enumerate(roots):
        slow = _slow_tree(shape, draft, root)
        paths = _paths(tree, row)
        assert len(set(paths)) == shape.nodes, "no path twice"
        assert set(paths) == set(slow)
        assert [len(path) for path in paths] == np.asarray(tree.depths[row])[1:].tolist()
        ancestors = np.asarray(tree.ancestors[row])
        for i, path in enumerate([(), *paths]):
            above = {path[:n] for n in range(len(path) + 1)}
            assert {q for j, q in enumerate([(), *paths]) if ancestors[i, j]} == above


def test_a_literal_tree():
    """From token 0: 1 (0.6) or 2 (0.4); after 1: 3 (0.9) or 4 (0.1); after 2: 5 or 3, half and half."""
    draft = np.full((V, V), 1e-9, np.float32)
    draft[0, [1, 2]], draft[1, [3, 4]], draft[2, [5, 3]] = (0.6, 0.4), (0.9, 0.1), (0.501, 0.499)
    shape = TreeShape(depth=2, top_k=2, nodes=4)
    proposals, _ = _grow_bigram(shape, draft, [0])
    assert proposals.tokens.tolist() == [[1, 2, 3, 4, 5, 3]]
    assert proposals.parents.tolist() == [[-1, -1, 0, 0, 1, 1]]
    assert np.exp(proposals.scores[0]) == pytest.approx([0.6, 0.4, 0.54, 0.06, 0.2004, 0.1996], rel=1e-5)
    tree = jax.jit(rerank, static_argnums=0)(shape, proposals, np.zeros(1, np.int32))
    assert tree.tokens.tolist() == [[0, 1, 2, 3, 5]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 2]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
    assert tree.ancestors[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


def test_what_the_draft_sees_while_it_grows():
    """Two levels read from a row with 2 cached pairs: width 2, so slots 2, 3 and then 4, 5."""
    draft = np.full((V, V), 1e-9, np.float32)
    draft[0, [1, 2]], draft[1, [3, 4]], draft[2, [5, 3]] = (0.6, 0.4), (0.9, 0.1), (0.5, 0.4)
    draft[3, [0, 1]], draft[5, [0, 1]] = (0.6, 0.4), (0.6, 0.4)
    _, shown = _grow_bigram(TreeShape(3, 2, 6), draft, [0])
    (length1, positions1, _, mask1, hidden1, tokens1), (length2, positions2, _, mask2, hidden2, tokens2) = shown
    assert (length1.tolist(), tokens1.tolist(), positions1.tolist()) == ([2], [[1, 2]], [[2, 2]])
    assert mask1[0, :, :6].astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]]
    assert (length2.tolist(), tokens2.tolist(), positions2.tolist()) == ([4], [[3, 5]], [[3, 3]])
    assert mask2[0, :, :6].astype(int).tolist() == [[1, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 1]]
    # The first level is read beside the root's hidden state, deeper ones beside their parent's.
    assert hidden1.argmax(-1).tolist() == [[0, 0]] and hidden2.argmax(-1).tolist() == [[1, 2]]


LITERAL = Tree(
    tokens=np.array([[0, 1, 2, 3, 5]], np.int32),
    parents=np.array([[0, 0, 0, 1, 2]], np.int32),
    depths=np.array([[0, 1, 1, 2, 2]], np.int32),
    ancestors=np.array([[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]], bool),
)


def test_tree_view_literal():
    config, _ = toy_target(num_layers=1)
    view = jax.jit(tree_view)(empty_cache(config, 1, 9)._replace(length=jnp.array([2], jnp.int32)), LITERAL)
    assert view.positions.tolist() == [[2, 3, 3, 4, 4]]
    assert view.key_positions.tolist() == [[0, 1, 2, 3, 3, 4, 4, 7, 8]]
    assert view.mask[0].astype(int).tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 1, 0, 0],
    ]


@pytest.mark.parametrize("family", [{}, {"sliding_window": 3, "sliding_layers": (True, False)}], ids=["full", "sliding"])
def test_a_tree_in_one_pass_is_its_paths_one_by_one(family):
    """Every node's hidden state is that of its own path read as plain text; kept, a path leaves the cache of plain text."""
    config, params = toy_target(**family)
    prompts = np.array([[7, 8, 9, 10], [1, 2, 3, 0]], np.int32)
    lengths = jnp.array([4, 3], jnp.int32)
    cache = empty_cache(config, 2, 12)
    _, cache = _decode(config, params, prompts, cached_view(cache, 4), cache)
    cache = cache._replace(length=lengths)
    tree = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), LITERAL)
    hidden, after = _decode(config, params, tree.tokens, jax.jit(tree_view)(cache, tree), cache)
    hidden = np.asarray(hidden)
    for row in range(2):
        committed = prompts[row, : lengths[row]].tolist()
        for node, path in enumerate([(), *_paths(tree, row)]):
            text = [*committed, 0, *path]
            padded = np.zeros((1, 8), np.int32)  # one shape, one program; padding comes last and is never looked at
            padded[0, : len(text)] = text
            alone = np.asarray(_hidden_states(config, params, padded))[0, len(text) - 1]
            assert np.allclose(hidden[row, node], alone, atol=1e-5)
    nodes = np.array([[0, 2, 4], [0, 1, 3]])
    kept = jax.jit(keep_path)(after, nodes)
    block = np.take_along_axis(tree.tokens, nodes, axis=1)
    _, plain = _decode(config, params, block, cached_view(cache, 3), cache)
    kept, plain = jax.device_get((kept, plain))
    for row in range(2):
        held = int(lengths[row]) + 3
        assert np.allclose(kept.k[:, row, :, :, :held], plain.k[:, row, :, :, :held], atol=1e-5)
        assert np.allclose(kept.v[:, row, :, :held], plain.v[:, row, :, :held], atol=1e-5)


def test_walk_literal():
    """The target chooses 2, then 5, then 4; or 1, then 0 (no child of it); or 3 at once (a child elsewhere only)."""
    walked = jax.jit(lambda logits: walk(LITERAL, 2, logits, lambda level, z: jnp.argmax(z, -1).astype(jnp.int32)))
    cases = {
        (2, None, 5, None, 4): ([0, 2, 4], [2, 5, 4], 2, 2),
        (1, 0, None, None, None): ([0, 1], [1, 0], 1, 2),
        (3, None, None, None, None): ([0], [3], 0, 1),
    }
    for choices, (nodes, tokens, accepted, judged) in cases.items():
        path = jax.device_get(walked(jax.nn.one_hot(np.array([[-1 if c is None else c for c in choices]]), V)))
        assert (int(path.num_accepted[0]), int(path.num_judged[0])) == (accepted, judged)
        assert path.nodes[0, : accepted + 1].tolist() == nodes and path.tokens[0, : accepted + 1].tolist() == tokens


def test_the_root_alone_accepts_nothing():
    tree = root_only(jnp.array([3, 4], jnp.int32))
    path = walk(tree, 0, jax.nn.one_hot(jnp.array([[5], [1]]), V), lambda level, z: jnp.argmax(z, -1).astype(jnp.int32))
    assert path.tokens.tolist() == [[5], [1]] and path.num_accepted.tolist() == path.num_judged.tolist() == [0, 0]


# --- Losslessness --------------------------------------------------------------------------------------------------


def _emit_two(judge, target):
    """The first two tokens of TRIALS verifications of the literal tree, completed by the target where only one came."""
    p = jnp.asarray(target)

    def trial(key):
        walk_key, rest_key = jax.random.split(key)
        tokens, accepted = judge(walk_key, p)
        alone = jax.random.categorical(rest_key, jnp.log(p[tokens[0]]))
        return tokens[0], jnp.where(accepted > 0, tokens[1], alone), accepted

    return joint_of_trials(trial, V)


def _ours(key, p, same_key=False):
    def choose(level, logits):
        return jax.random.categorical(key if same_key else jax.random.fold_in(key, level), logits).astype(jnp.int32)

    path = walk(LITERAL, 2, jnp.log(p)[LITERAL.tokens], choose)
    return path.tokens[0], path.num_accepted[0]


def _one_by_one(key, p, renormalise=True, residual=True):
    """The same verification as papers write it: children in turn, each accepted with its share of the mass still left."""

    def token_below(number, parent, children):
        left, chosen, token = p[parent], jnp.bool_(False), 0
        for order, child in enumerate(children):
            share = left[child] / (jnp.sum(left) if renormalise else 1.0)
            takes = ~chosen & (jax.random.uniform(jax.random.fold_in(key, 10 * number + order)) < share)
            token, chosen = jnp.where(takes, child, token), chosen | takes
            left = left.at[child].set(0.0) if residual else left
        other = jax.random.categorical(jax.random.fold_in(key, 10 * number + 9), jnp.log(left))
        return jnp.where(chosen, token, other), chosen

    first, accepted = token_below(0, 0, [1, 2])
    after_1, after_2 = token_below(1, 1, [3])[0], token_below(2, 2, [5])[0]
    return jnp.stack([first, jnp.where(first == 1, after_1, after_2)]), accepted.astype(jnp.int32)


@pytest.mark.slow
def test_two_tokens_have_the_targets_distribution():
    target = _bigram(7, 0.6)
    joint, accepted = _emit_two(_ours, target)
    assert abs(deviation(joint, target)) < 5
    alpha = float(target[0][[1, 2]].sum())  # the mass of the root's children
    assert np.mean(accepted > 0) == pytest.approx(alpha, abs=5 * np.sqrt(alpha * (1 - alpha) / TRIALS))


@pytest.mark.slow
def test_looking_up_one_draw_is_trying_the_children_in_turn():
    target = _bigram(7, 0.6)
    joint, accepted = _emit_two(_one_by_one, target)
    assert abs(deviation(joint, target)) < 5
    assert np.mean(accepted > 0) == pytest.approx(np.mean(_emit_two(_ours, target)[1] > 0), abs=5 * 0.7 / np.sqrt(TRIALS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        lambda key, p: _one_by_one(key, p, residual=False),
        lambda key, p: _one_by_one(key, p, renormalise=False),
        lambda key, p: _ours(key, p, same_key=True),
    ],
    ids=["no residual", "no renormalisation", "reused key"],
)
def test_the_test_has_power(wrong):
    target = _bigram(7, 0.6)
    assert deviation(_emit_two(wrong, target)[0], target) > 20


# --- Refusals ------------------------------------------------------------------------------------------------------


def test_shapes_that_cannot_be():
    with pytest.raises(ValueError, match="larger than its depth allows: depth 2 with top-k 3 proposes 12"):
        TreeShape(depth=2, top_k=3, nodes=13)
    for depth, top_k, nodes in itertools.product([0, 1], repeat=3):
        if not depth * top_k * nodes:
            with pytest.raises(ValueError, match="must be 1 or more"):
                TreeShape(depth, top_k, nodes)
    assert TreeShape(7, 10, 60).num_proposals == 610
