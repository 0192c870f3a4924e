"""The loop: speculative decoding is autoregressive decoding, whatever the draft, the batch or the devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import TOY_LENGTHS, USERS_PROGRAM, compiled_decoder, good_draft, toy_draft, toy_prompts, toy_target

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import DecodeStats
from jsfdd.decoding import generate as generate_module
from jsfdd.decoding.generate import count_step, make_generate, make_stream, prepare_params
from jsfdd.decoding.settings import Combine, Cutoff, DecodeSetup, TreeShape
from jsfdd.decoding.state import PromptBatch
from jsfdd.decoding.verify import warp
from jsfdd.models.target import head_logits, hidden_states

GREEDY = jnp.float32(0)
ROUTED, MERGED = Combine("route", route_steps=2), Combine("merge")


def _slow_greedy(config, params, prompt, num_tokens):
    """The obvious decoder: the whole sequence again for every token. Returns tokens and the top-2 gap of each choice."""
    forward = jax.jit(lambda tokens: head_logits(config, params, hidden_states(config, params, tokens)))
    tokens, gaps = list(prompt), []
    for _ in range(num_tokens):
        padded = np.zeros((1, 32), np.int32)  # one shape, one compilation; padding comes last and is never looked at
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(padded)[0, len(tokens) - 1])
        gaps.append(np.diff(np.sort(logits)[-2:])[0])
        tokens.append(int(np.argmax(logits)))
    return tokens[len(prompt) :], gaps


# Most tests share a few programs, those of chains and trees three deep: compiling is most of what tests of toys take.
DEPTH, TREE = 3, TreeShape(3, 3, 9)


def _run(setup, params, prompts, temperature=0.0):
    return compiled_decoder(setup)(params, prompts, jnp.float32(temperature))


def _setup(config, *drafts, depth=None, longest=24, **changes):
    depth = (DEPTH if drafts else 0) if depth is None else depth
    return DecodeSetup(target=config, drafts=drafts, num_draft_tokens=depth, max_new_tokens=longest, **changes)


def _good(config, params):
    """The models with a draft that is often right."""
    return params._replace(drafts=(good_draft(config, params.target),))


def _twice(params, combine):
    """The models as often as drafts are needed: twice where they are to be combined."""
    return params._replace(drafts=params.drafts * 2) if combine else params


@pytest.fixture(scope="module")
def models():
    config, target = toy_target()
    draft, draft_params = toy_draft(config)
    return config, draft, prepare_params(target, [draft_params])


def test_autoregressive_equals_the_slow_decoder(models):
    config, _, params = models
    prompts = toy_prompts()
    out = _run(_setup(config), params, prompts)
    for row, length in enumerate(TOY_LENGTHS):
        slow, gaps = _slow_greedy(config, params.target, np.asarray(prompts.tokens[row, :length]), 10)
        assert min(gaps) > 1e-3, "a near-tie would make the comparison meaningless"
        assert slow == out.tokens[row, :10].tolist()


@pytest.mark.parametrize("depth", [1, DEPTH])
@pytest.mark.parametrize("which", ["random draft", "good draft"])
def test_greedy_speculative_equals_autoregressive(models, depth, which):
    config, draft, params = models
    if which == "good draft":
        # A target that repeats its input's argmax chain often: layers damped, so that h_{t+1} ≈ embedding of x_{t+1}.
        params = _good(config, params)
    prompts = toy_prompts()
    plain = _run(_setup(config), params, prompts)
    fast = _run(_setup(config, draft, depth=depth), params, prompts)
    assert np.array_equal(plain.tokens, fast.tokens)
    assert np.array_equal(plain.lengths, fast.lengths)
    # The counts tell the same story as the text: steps and accepted tokens make up all tokens but each row's first.
    steps = fast.stats.accept_counts.sum(1)
    emitted = steps + fast.stats.accepted.sum(1)
    assert np.all(np.asarray(emitted) >= np.asarray(fast.lengths) - 1)
    assert np.all(np.asarray(emitted) <= np.asarray(fast.lengths) - 1 + depth)


# The cutoff is of the target's distribution, whatever the tree: one tree shows it.
TREES = [(TreeShape(1, 3, 3), Cutoff()), (TreeShape(3, 1, 3), Cutoff()), (TREE, Cutoff()), (TREE, Cutoff(top_k=9, top_p=0.8))]


@pytest.mark.parametrize("tree, cutoff", TREES, ids=str)
def test_a_trees_text_is_plain_decodings_at_every_temperature(models, tree, cutoff):
    """Sampled too: both draw the token at a position with that position's key, from the same distribution."""
    config, draft, params = models
    params, prompts = _good(config, params), toy_prompts()
    for temperature in (0.0, 0.7, 1.0):
        plain = _run(_setup(config, cutoff=cutoff), params, prompts, temperature)
        fast = _run(_setup(config, draft, depth=tree.depth, tree=tree, cutoff=cutoff), params, prompts, temperature)
        assert np.array_equal(plain.tokens, fast.tokens)
        assert np.asarray(fast.stats.accepted).sum() > 0, "a draft that is never right would prove nothing"
        emitted = np.asarray(fast.stats.accept_counts.sum(1) + fast.stats.accepted.sum(1))
        assert np.all(emitted >= 23) and np.all(emitted <= 23 + tree.depth)


@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
def test_a_draft_vocabulary_bounds_what_is_accepted_and_not_what_is_said(models, tree):
    config, draft, params = models
    params, prompts = _good(config, params), toy_prompts()
    plain = _run(_setup(config), params, prompts)
    said, times = np.unique(plain.tokens, return_counts=True)
    few = tuple(np.sort(said[np.argsort(-times)[:4]]).tolist())
    fast = _run(_setup(config, dataclasses.replace(draft, vocabulary=few), tree=tree), params, prompts)
    assert np.array_equal(plain.tokens, fast.tokens)
    assert 0 < int(np.asarray(fast.stats.accepted).sum()) <= np.isin(np.asarray(plain.tokens), few).sum()


def test_a_chain_is_a_tree_with_one_branch(models):
    config, draft, params = models
    params = _good(config, params)
    chain = _run(_setup(config, draft), params, toy_prompts())
    branch = _run(_setup(config, draft, tree=TreeShape(3, 1, 3)), params, toy_prompts())
    assert np.asarray(chain.stats.accepted).sum() > 0
    assert jax.tree.all(jax.tree.map(np.array_equal, chain, branch))


def test_a_wider_tree_accepts_more(models):
    """The same draft, three levels deep: added branches can only find more of the target's choices."""
    config, draft, params = models
    params = _good(config, params)
    outs = [_run(_setup(config, draft, tree=shape), params, toy_prompts()) for shape in (TreeShape(3, 1, 3), TREE)]
    narrow, wide = (int(out.stats.accept_counts.sum()) for out in outs)
    assert narrow > wide


def test_a_perfect_draft_is_always_accepted():
    """A target that only looks at its last token's embedding, and a draft that computes just that."""
    config, target = toy_target(seed=3)
    target = dict(target, layers=jax.tree.map(jnp.zeros_like, target["layers"]))
    # hidden = norm(embedding); the draft returns the normed embedding of its token: unit-RMS rows make that linear.
    rows = target["embed"]["embedding"]
    target["embed"] = {"embedding": rows / jnp.sqrt(jnp.mean(rows**2, axis=1, keepdims=True))}
    target["norm"] = {"scale": jnp.ones(config.hidden_size)}
    draft, draft_params = toy_draft(config)
    draft_params = jax.tree.map(jnp.zeros_like, draft_params)
    draft_params["fc"]["kernel"] = draft_params["fc"]["kernel"].at[: config.hidden_size].set(jnp.eye(config.hidden_size))
    out = _run(_setup(config, draft), prepare_params(target, [draft_params]), toy_prompts())
    assert np.array_equal(out.stats.accept_counts[:, DEPTH], [6] * 4)  # 23 tokens after the first: 6 steps of up to 4
    assert np.asarray(out.stats.accept_counts[:, :DEPTH]).sum() == 0
    assert np.array_equal(out.stats.accepted, out.stats.reached)


def test_stop_token_ends_a_row_and_only_that_row(models):
    config, draft, params = models
    prompts = toy_prompts()
    free = np.asarray(_run(_setup(config), params, prompts).tokens)
    stop = int(free[1, 7])  # row 1 stops here at the latest
    out = _run(_setup(config, draft, stop_tokens=(stop,)), params, prompts)  # plain decoding's: tests of `respond`
    for row in range(4):
        where = np.flatnonzero(free[row] == stop)
        expected = where[0] + 1 if len(where) else 24
        assert out.lengths[row] == expected
        assert np.array_equal(out.tokens[row, :expected], free[row, :expected])


def test_text_does_not_depend_on_batch_or_devices(models):
    config, draft, params = models
    setup, prompts = _setup(config, draft), toy_prompts()
    whole = _run(setup, params, prompts, 1.0)
    others = toy_prompts(seed=8)
    for row in range(4):  # beside other rows, and in another place
        mixed = jax.tree.map(lambda a, b, row=row: jnp.roll(b.at[row].set(a[row]), 1, axis=0), prompts, others)
        assert np.array_equal(_run(setup, params, mixed, 1.0).tokens[(row + 1) % 4], whole.tokens[row])
    spread = make_generate(setup, make_mesh())(params, prompts, 1.0)  # alone on a device each
    assert np.array_equal(spread.tokens, whole.tokens)
    assert np.array_equal(spread.stats.accept_counts, whole.stats.accept_counts)


def test_filler_rows_emit_nothing(models):
    config, draft, params = models
    setup, prompts = _setup(config, draft), toy_prompts()
    out = _run(setup, params, prompts._replace(lengths=prompts.lengths.at[jnp.array([1, 3])].set(0)))
    assert np.array_equal(out.lengths, [24, 0, 24, 0])
    assert np.asarray(out.stats.accept_counts)[[1, 3]].sum() == 0
    assert np.array_equal(out.tokens[::2], _run(setup, params, prompts).tokens[::2])


STREAMED = {"chain": (None, None), "merged": (TREE, MERGED)}


@pytest.mark.parametrize("tree, combine", STREAMED.values(), ids=STREAMED.keys())
def test_streaming_equals_generate(models, tree, combine):
    config, draft, params = models
    params, prompts = _twice(_good(config, params), combine), toy_prompts()
    setup = _setup(config, *[draft] * len(params.drafts), tree=tree, combine=combine)
    start, step = make_stream(setup)
    state = start(params, prompts, GREEDY)
    pieces = [[int(t)] for t in state.last_token]
    stats = DecodeStats(jnp.zeros((4, 4), jnp.int32), jnp.zeros((4, 3), jnp.int32), jnp.zeros((4, 3), jnp.int32))
    while not np.all(state.done):
        state, emitted = step(params, state, GREEDY)
        stats = count_step(stats, emitted)
        for row in range(4):
            pieces[row] += emitted.tokens[row, : int(emitted.count[row])].tolist()
    whole = _run(setup, params, prompts)
    for row in range(4):
        assert pieces[row][:24] == whole.tokens[row].tolist()
    assert jax.tree.all(jax.tree.map(np.array_equal, stats, whole.stats))


SAMPLED = {"plain": (0, Cutoff()), "chain": (2, Cutoff()), "chain, top-k and top-p": (2, Cutoff(top_k=4, top_p=0.85))}


@pytest.mark.slow
@pytest.mark.parametrize("depth, cutoff", SAMPLED.values(), ids=SAMPLED)
def test_sampled_text_has_the_targets_distribution(depth, cutoff):
    """Three tokens, over 20,000 sampled continuations of one prompt, against the exact joint of the warped target.

    A tree's text, of one draft or several, is plain decoding's token for token, which other tests show.
    """
    vocab, trials = 5, 20_000
    config, target = toy_target(seed=2, sharpness=1.5, vocab_size=vocab, num_layers=1, hidden_size=16)
    draft, draft_params = toy_draft(config)
    setup = _setup(config, *[draft][:depth], depth=depth, longest=3, cutoff=cutoff)
    params, prompt = prepare_params(target, [draft_params]), [1, 4, 2]

    texts = np.array([[*prompt, a, b] for a in range(vocab) for b in range(vocab)], np.int32)
    logits = head_logits(config, target, hidden_states(config, target, texts))
    probs = jax.nn.softmax(warp(logits, jnp.float32(1), cutoff))
    after = np.asarray(probs, np.float64).reshape(vocab, vocab, 5, vocab)  # [a, b, position, next]
    joint = after[0, 0, 2][:, None, None] * after[:, 0, 3][:, :, None] * after[:, :, 4]
    decode = make_generate(setup, make_mesh(data=2))
    counts, rows = np.zeros((vocab,) * 3), 10_000
    for chunk in range(trials // rows):
        keys = jax.random.split(jax.random.key(chunk), rows)
        batch = PromptBatch(jnp.tile(jnp.asarray([prompt], jnp.int32), (rows, 1)), jnp.full(rows, 3, jnp.int32), keys)
        out = np.asarray(decode(params, batch, 1.0).tokens)
        np.add.at(counts, tuple(out.T), 1)
    assert counts[joint == 0].sum() == 0
    cells = joint * trials > 5
    statistic = np.sum((counts[cells] - joint[cells] * trials) ** 2 / (joint[cells] * trials))
    freedom = cells.sum() - 1
    assert abs(statistic - freedom) / np.sqrt(2 * freedom) < 5


@pytest.mark.parametrize("combine", [None, ROUTED, MERGED], ids=["plain", "routed", "merged"])
def test_traces_once_per_shape(models, monkeypatch, combine):
    config, draft, params = models
    params = _twice(params, combine) if combine else params._replace(drafts=())
    traces = []
    original = generate_module.decode
    monkeypatch.setattr(generate_module, "decode", lambda *a: traces.append(1) or original(*a))
    setup = _setup(config, *[draft] * len(params.drafts), tree=TREE if combine else None, combine=combine)
    run = make_generate(setup, make_mesh(data=1))
    # Tracing is what a call does first; of one program the calls are seen to the end.
    call = functools.partial(jax.eval_shape, run) if combine else run
    call(params, toy_prompts(), 0)
    before = len(traces)
    call(params, toy_prompts(seed=6), 0.8)
    assert len(traces) == before > 0
    call(params, toy_prompts(lengths=TOY_LENGTHS[:2]), 0.8)
    assert len(traces) == 2 * before


# A chain does all that plain decoding does; drafts that are routed add trees, paths that move, and caches that rest.
COMPILED = {"chain": (1, None, None), "routed": (2, TREE, ROUTED)}


@pytest.mark.parametrize("drafts, tree, combine", COMPILED.values(), ids=COMPILED.keys())
def test_the_compiled_loop_never_copies_a_cache(models, drafts, tree, combine):
    """Inside the loop's body a cache is only ever updated in place: no copy or transpose of its shape, or of a layer's part."""
    config, draft, params = models
    params = _twice(params, combine)
    setup = _setup(config, *[draft] * drafts, tree=tree, combine=combine)
    text = compiled_decoder(setup).lower(params, toy_prompts(), GREEDY).compile(compiler_options=USERS_PROGRAM).as_text()
    slots = setup.cache_slots(12)
    cache = rf"f32\[(?:[12],)?(?:4,2|8),(?:8,{slots}|{slots},8)\]"
    assert re.search(cache + r".* scatter\(", text)
    computation, copies = "", []
    for line in text.splitlines():
        computation = line if line.endswith("{") else computation
        if re.search(rf"= {cache}\S* (copy|transpose)\(", line) and not computation.startswith("ENTRY"):
            copies.append(line.strip())
    # ENTRY makes the caches once; everything that a step does is in computations that the loop calls.
    assert not copies


@pytest.mark.parametrize("kind", ["plain", "chain", "tree"])
def test_a_bfloat16_target_is_decoded_in_bfloat16(kind):
    """As accelerators read it, layers as a scan and float32 norm scales: caches and every product are bfloat16."""
    config, target = toy_target()
    draft, draft_params = toy_draft(config)
    drafts, tree = {"plain": ((), None), "chain": ((draft,), None), "tree": ((draft,), TREE)}[kind]
    target = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path[-1].key == "scale" else leaf.astype(jnp.bfloat16), target
    )
    params = prepare_params(target, [draft_params] * len(drafts))._replace(stepping=target)
    setup = _setup(config, *drafts, tree=tree)
    state = jax.eval_shape(functools.partial(generate_module.prefill, setup), params, toy_prompts(), GREEDY)
    assert {cache.k.dtype for cache in (state.target_cache, *state.draft_caches)} == {jnp.dtype("bfloat16")}
    text = jax.jit(functools.partial(generate_module.decode_prompts, setup)).lower(params, toy_prompts(), GREEDY).as_text()
    products = re.findall(r"stablehlo\.dot_general .* : \((tensor<[^>]*>), (tensor<[^>]*>)\)", text)
    assert products and not [pair for pair in products if all(operand.endswith("xf32>") for operand in pair)]


def test_setup_refuses_draft_tokens_without_a_draft(models):
    config, draft, _ = models
    with pytest.raises(ValueError, match="num_draft_tokens=3 with 0 drafts"):
        _setup(config, depth=3)
    with pytest.raises(ValueError, match="num_draft_tokens=0 with 1 drafts"):
        _setup(config, draft, depth=0)
    assert dataclasses.replace(_setup(config), max_new_tokens=4).cache_slots(10) == 15


def test_setup_refuses_trees_that_do_not_fit(models):
    config, draft, _ = models
    with pytest.raises(ValueError, match="num_draft_tokens=3 with a tree of depth 2"):
        _setup(config, draft, depth=3, tree=TreeShape(2, 2, 4))
    with pytest.raises(ValueError, match="tree's top-k 65 exceeds the vocabulary of 64"):
        _setup(config, draft, depth=2, tree=TreeShape(2, 65, 70))
    with pytest.raises(ValueError, match="top-k 99 exceeds"):
        _setup(config, draft, depth=2, cutoff=Cutoff(top_k=99))
