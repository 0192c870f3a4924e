"""The decoding loop: prefill, then draft, verify and commit until every row has stopped.

One step. Before it, a row has committed tokens x_0 … x_c. The target's cache holds x_0 … x_{c−1}. A draft's cache holds the
pairs (h_t, x_{t+1}) for t < c, and `draft_hidden` is its output at the last pair, its guess of h_c.

    draft    q_1 = head(draft_hidden) gives d_1; the draft then reads its own guesses (ĥ_c, d_1), … for d_2 … d_G
    verify   the target reads x_c, d_1 … d_G in one forward pass: hidden h_c … h_{c+G} and p_0 … p_G; h has what a draft reads
    commit   a accepted tokens and one more from the target; both caches keep a+1 of their new slots
    observe  the draft reads the pairs again with the *true* hidden states, ready for the next step

Draft tokens form a chain, sampled from q and verified by speculative sampling (`verify.py`), or a tree of the draft's best
guesses, in which the target's own choice is looked up (`tree.py`). Lowering a cache's length rolls back the rejected tokens;
for a tree, the accepted path is first moved into consecutive slots. Without a draft the tree is only its root and there is
nothing to observe: the loop is then plain autoregressive decoding, the baseline of every speedup.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jsfdd.base.mesh import map_over_devices, replicate
from jsfdd.base.records import DecodeStats, DraftShares, Generation, KVCache
from jsfdd.decoding.drafting import draft_chain, draft_tree, observe
from jsfdd.decoding.ensemble import no_routing
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.decoding.state import DecodeParams, DecodeState, Emitted, PromptBatch
from jsfdd.decoding.tree import Path, keep_path, one_branch, tree_view, walk
from jsfdd.decoding.verify import draw, fold_in_rows, verify
from jsfdd.models.attention import causal_view, empty_cache
from jsfdd.models.sharding import place_params
from jsfdd.models.target import decode, final_state, head_logits, unstack_layers


def decode_prompts(setup: DecodeSetup, params: DecodeParams, batch: PromptBatch, temperature: Float[Array, ""]) -> Generation:
    """Decode whole answers in one program: prefill, then steps until every row is done."""
    state = prefill(setup, params, batch, temperature)
    return until_done(setup, state, lambda state: speculative_step(setup, params, state, temperature))


def speculative_step(
    setup: DecodeSetup, params: DecodeParams, state: DecodeState, temperature: Float[Array, ""]
) -> tuple[DecodeState, Emitted]:
    """Do one step with one verification: state -> (state, what was emitted). Rows that are done do not change."""
    position = state.target_cache.length + 1  # where the next token goes
    if setup.is_chain:
        keys = fold_in_rows(state.keys, position)
        draft_tokens, draft_logits, state = draft_chain(setup, params, state, keys, temperature)
        tree = one_branch(state.last_token, draft_tokens)
        proposers = jnp.zeros_like(tree.tokens)
    else:
        tree, proposers, state = draft_tree(setup, params, state)

    view = tree_view(state.target_cache, tree)
    hidden, target_cache = decode(setup.target, params.stepping, tree.tokens, view, state.target_cache, setup.layers)
    logits = head_logits(setup.target, params.target, final_state(setup.target, hidden))

    if setup.is_chain:
        verify_keys = fold_in_rows(keys, setup.num_draft_tokens)
        verdict = verify(verify_keys, draft_tokens, draft_logits, logits, temperature, setup.cutoff)
        path = _chain_path(draft_tokens, *verdict)
    else:
        # As in plain decoding, the token at a position is sampled from p with the key of that position.
        def choose(level, logits):
            return draw(fold_in_rows(state.keys, position + level), logits, temperature, setup.cutoff)

        path = walk(tree, setup.num_draft_tokens, logits, choose)
        if setup.drafts:
            hidden = jnp.take_along_axis(hidden, path.nodes[:, :, None], axis=1)
            target_cache = keep_path(target_cache, path.nodes)
    return commit(setup, params, state, path, proposers, hidden, target_cache)


def commit(
    setup: DecodeSetup,
    params: DecodeParams,
    state: DecodeState,
    path: Path,
    proposers: Int[Array, "B N"],
    hidden: Float[Array, "B G1 S"],
    target_cache: KVCache,
) -> tuple[DecodeState, Emitted]:
    """Commit the target's path through the draft tokens: return the new state and what was emitted.

    Args:
      proposers: which draft proposed each node that the target read.
      hidden: the target's hidden states at the last committed token and at the accepted ones, as drafts observe them.
      target_cache: with its length before the step; the slots of the accepted tokens follow it.
    """
    row, column = jnp.arange(state.done.shape[0]), jnp.arange(setup.num_draft_tokens + 1)[None, :]
    # Emit the accepted tokens and one of the target's, up to a stop token. Draft tokens after it do not count as verified.
    stops = _is_stop(setup, path.tokens) & (column <= path.num_accepted[:, None])
    stopped = jnp.any(stops, axis=1)
    count = jnp.where(stopped, jnp.argmax(stops, axis=1), path.num_accepted) + 1
    count = jnp.where(state.done, 0, count)
    accepted = jnp.minimum(path.num_accepted, count)
    verified = jnp.where(count > path.num_accepted, path.num_judged, accepted)
    drafts = jnp.arange(len(setup.drafts))
    emitted = Emitted(
        tokens=path.tokens,
        count=count,
        accepted=accepted,
        verified=jnp.where(state.done, 0, verified),
        active=~state.done,
        proposers=jnp.take_along_axis(proposers, path.nodes[:, 1:], axis=1),
        offered=jnp.sum(proposers[:, 1:, None] == drafts[None, None, :], axis=1, dtype=jnp.int32),
    )
    num_generated = state.num_generated + count
    state = state._replace(
        generated=_write_rows(state.generated, path.tokens, state.num_generated, state.done),
        num_generated=num_generated,
        last_token=jnp.where(state.done, state.last_token, path.tokens[row, path.num_accepted]),
        done=state.done | stopped | (num_generated >= setup.max_new_tokens),
        target_cache=target_cache._replace(length=state.target_cache.length + count),
    )
    return (observe(setup, params, state, hidden, path.tokens, count) if setup.drafts else state), emitted


def prefill(setup: DecodeSetup, params: DecodeParams, batch: PromptBatch, temperature: Float[Array, ""]) -> DecodeState:
    """Read the prompts, draw each row's first token from the target, and let the drafts read the prompts' pairs."""
    rows, width = batch.tokens.shape
    cache = empty_cache(setup.target, rows, setup.cache_slots(width), _weights_dtype(params.target))
    hidden, cache = decode(setup.target, params.target, batch.tokens, causal_view(rows, width), cache, setup.layers)
    row, last = jnp.arange(rows), jnp.maximum(batch.lengths - 1, 0)
    logits = head_logits(setup.target, params.target, final_state(setup.target, hidden[row, last]))
    first = draw(fold_in_rows(batch.keys, batch.lengths), logits, temperature, setup.cutoff)
    state = start(setup, first, batch.lengths, cache._replace(length=batch.lengths), batch.keys)
    next_tokens = jnp.roll(batch.tokens, -1, axis=1).at[row, last].set(first)
    return show_prompt(setup, params, state, hidden, next_tokens, setup.cache_slots(width))


def start(
    setup: DecodeSetup, first: Int[Array, " B"], lengths: Int[Array, " B"], target_cache: KVCache, keys: Array
) -> DecodeState:
    """The state after the target has read prompts of these lengths and drawn each row's first token."""
    generated = jnp.zeros((len(first), setup.max_new_tokens + setup.num_draft_tokens + 1), jnp.int32)
    return DecodeState(
        generated=generated.at[:, 0].set(first),
        num_generated=jnp.minimum(lengths, 1),  # a padding row stays empty
        last_token=first,
        done=(lengths == 0) | _is_stop(setup, first) | (setup.max_new_tokens <= 1),
        target_cache=target_cache,
        keys=keys,
    )


def show_prompt(
    setup: DecodeSetup,
    params: DecodeParams,
    state: DecodeState,
    hidden: Float[Array, "B P S"],
    next_tokens: Int[Array, "B P"],
    slots: int,
) -> DecodeState:
    """Add draft caches of `slots` slots, filled with all pairs up to the answer's first token."""
    if not setup.drafts:
        return state
    rows = state.done.shape[0]
    state = state._replace(
        draft_caches=tuple(empty_cache(draft.decoder, rows, slots, _weights_dtype(params.target)) for draft in setup.drafts),
        draft_hidden=(jnp.zeros_like(final_state(setup.target, hidden[:, 0])),) * len(setup.drafts),
    )
    state = observe(setup, params, state, hidden, next_tokens, state.target_cache.length, whole=True)
    return state._replace(routing=no_routing(setup.combine, rows, len(setup.drafts)))


def until_done(
    setup: DecodeSetup, state: DecodeState, take_step: Callable[[DecodeState], tuple[DecodeState, Emitted]]
) -> Generation:
    """Take steps until every row is done, and count what they emit."""
    rows, depth, drafts = state.done.shape[0], setup.num_draft_tokens, len(setup.drafts)
    zeros = [jnp.zeros((rows, columns), jnp.int32) for columns in (depth + 1, depth, depth, drafts, drafts)]
    stats, shares = DecodeStats(*zeros[:3]), DraftShares(*zeros[3:])

    def step(carry):
        before, drafted, stats, shares = carry
        state, emitted = take_step(before)
        proposed = jnp.arange(depth + 1)[None, :] < emitted.accepted[:, None]
        drafted = _write_rows(drafted, proposed, before.num_generated, before.done)
        return state, drafted, count_step(stats, emitted), count_shares(shares, emitted)

    carry = (state, jnp.zeros(state.generated.shape, bool), stats, shares)
    state, drafted, stats, shares = jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].done), step, carry)
    lengths = jnp.minimum(state.num_generated, setup.max_new_tokens)
    longest = slice(setup.max_new_tokens)
    return Generation(state.generated[:, longest], lengths, drafted[:, longest], stats, shares)


def count_step(stats: DecodeStats, emitted: Emitted) -> DecodeStats:
    """Add one step to the counts. If a stop token ends the step, the draft tokens up to and including it count."""
    depth = stats.reached.shape[1]
    histogram = (jnp.arange(depth + 1)[None, :] == emitted.accepted[:, None]) & emitted.active[:, None]
    level = jnp.arange(depth)[None, :]
    return DecodeStats(
        accept_counts=stats.accept_counts + histogram,
        reached=stats.reached + (level < emitted.verified[:, None]),
        accepted=stats.accepted + ((level < emitted.accepted[:, None]) & emitted.active[:, None]),
    )


def count_shares(shares: DraftShares, emitted: Emitted) -> DraftShares:
    """Add one step to the counts by draft."""
    drafts, level = jnp.arange(shares.offered.shape[1]), jnp.arange(emitted.proposers.shape[1])
    accepted = level[None, :, None] < emitted.accepted[:, None, None]
    by_draft = (emitted.proposers[:, :, None] == drafts[None, None, :]) & accepted
    return DraftShares(
        offered=shares.offered + jnp.where(emitted.active[:, None], emitted.offered, 0),
        accepted=shares.accepted + jnp.sum(by_draft, axis=1, dtype=jnp.int32),
    )


def prepare_params(target_params: dict, draft_params: Sequence[dict] = (), mesh: Mesh | None = None) -> DecodeParams:
    """Arrange the weights of a target and its drafts for the loop, and place them on the mesh if one is given."""
    if mesh is not None:
        target_params = place_params(target_params, mesh)
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    stepping = unstack_layers(target_params) if platform == "cpu" else target_params
    return DecodeParams(target_params, stepping, prepare_drafts(draft_params, target_params, mesh))


def prepare_drafts(draft_params: Sequence[dict], target_params: dict, mesh: Mesh | None = None) -> tuple[dict, ...]:
    """The drafts' weights as the loop reads them: in the target's dtype but for norm scales, and on the mesh if one is given.

    A draft is trained in float32. Beside a bfloat16 target it would turn all that it reads into float32, and take twice the
    bytes in every step.
    """
    dtype = _weights_dtype(target_params)

    def stored(path, leaf):
        return leaf if path[-1].key == "scale" else leaf.astype(dtype)

    drafts = tuple(jax.tree_util.tree_map_with_path(stored, params) for params in draft_params)
    return drafts if mesh is None else replicate(drafts, mesh)


@functools.lru_cache(maxsize=8)
def make_generate(setup: DecodeSetup, mesh: Mesh) -> Callable[[DecodeParams, PromptBatch, float], Generation]:
    """Compile `decode_prompts` as a function of (params, batch, temperature).

    Rows are split over the devices, and each device stops by itself.

    `params` comes from `prepare_params`. Every new (B, P) shape of a batch is compiled.
    """

    def run(arguments, batch):
        params, temperature = arguments
        return decode_prompts(setup, params, batch, temperature)

    compiled = map_over_devices(run, mesh)

    def decode_batch(params: DecodeParams, batch: PromptBatch, temperature: float) -> Generation:
        return compiled((params, jnp.asarray(temperature, jnp.float32)), batch)

    return decode_batch


@functools.lru_cache(maxsize=8)
def make_stream(setup: DecodeSetup) -> tuple[Callable, Callable]:
    """Compile (prefill, step) for text that is shown while it is decoded: one call per step; `step` donates the state.

    Returns:
      `prefill(params, batch, temperature) -> state`, and `step(params, state, temperature) -> (state, Emitted)`.
    """

    def begin(params, batch, temperature):
        return prefill(setup, params, batch, temperature)

    def step(params, state, temperature):
        return speculative_step(setup, params, state, temperature)

    return jax.jit(begin), jax.jit(step, donate_argnames=("state",))


def _chain_path(draft_tokens: Int[Array, "B G"], num_accepted: Int[Array, " B"], next_token: Int[Array, " B"]) -> Path:
    """The accepted draft tokens and the next token, as a path down a tree with one branch."""
    rows, depth = draft_tokens.shape
    tokens = jnp.concatenate([draft_tokens, next_token[:, None]], axis=1).at[jnp.arange(rows), num_accepted].set(next_token)
    nodes = jnp.broadcast_to(jnp.arange(depth + 1), tokens.shape)
    return Path(nodes, tokens, num_accepted, num_judged=jnp.minimum(num_accepted + 1, depth))


def _weights_dtype(target_params: dict):
    return target_params["embed"]["embedding"].dtype  # norm scales are float32 in every target


def _is_stop(setup: DecodeSetup, tokens: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
    return jnp.isin(tokens, jnp.asarray(setup.stop_tokens, jnp.int32))


def _write_rows(buffer, block, start, keep):
    """Write `block` into each row of `buffer` at `start`, except rows to `keep`. Slots past a row's count are free to use."""

    def write(row, new, at, keep_row):
        old = jax.lax.dynamic_slice(row, (at,), new.shape)
        return jax.lax.dynamic_update_slice(row, jnp.where(keep_row, old, new), (at,))

    return jax.vmap(write)(buffer, block, start, keep)
