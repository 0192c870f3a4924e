"""Several drafts for one target (TAPS, arXiv 2603.27027): averaged into one, or decoding together.

    average  one draft whose weights are a linear combination of the drafts' weights; nothing else changes
    route    every draft proposes a tree, and the target verifies the tree of the most confident draft. With `route_steps`, a
             prompt is assigned to one draft for good after its first steps, and the other drafts no longer run for it
    merge    the drafts' trees become one tree, with as many nodes as a single draft's (`merge.py`)

Routing and merging work on trees only. A tree may be chosen by its proposals without changing the text, because the target
samples its token first and then looks it up among the tree's nodes. A chain's tokens are sampled from the draft, so choosing
the best-looking chain would change the distribution of the text. (A tree with `top_k=1` is a greedy chain.) After a step,
every draft's cache observes the same true pairs, whichever draft was chosen.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsfdd.decoding.settings import Combine, TreeShape
from jsfdd.decoding.tree import Proposals, path_probs
from jsfdd.models.draft import Draft, DraftConfig


class Routing(NamedTuple):
    """How confident each of the E drafts has been in each row, until the row is assigned to one draft for good."""

    sureness: Float[Array, "B E"]  # the sum over the steps so far
    steps: Int[Array, " B"]  # the number of those steps, at most `route_steps`


def no_routing(combine: Combine | None, rows: int, drafts: int) -> Routing | None:
    """The routing before the first step; None unless rows are assigned to a draft for good."""
    if combine is None or not combine.route_steps:
        return None
    return Routing(jnp.zeros((rows, drafts)), jnp.zeros(rows, jnp.int32))


def confidence(shape: TreeShape, proposals: Proposals) -> Float[Array, " B"]:
    """The mean path probability over the nodes of a draft's tree, without its root."""
    return jnp.mean(path_probs(shape, proposals)[:, 1:], axis=1)


def certainty(log_probs: Float[Array, "B V"]) -> Float[Array, " B"]:
    """The negative entropy of a distribution, in nats."""
    return jnp.sum(jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)


def route(
    combine: Combine, sureness: Float[Array, "B E"], routing: Routing | None, done: Bool[Array, " B"]
) -> tuple[Int[Array, " B"], Routing | None]:
    """Choose the draft whose tree each row verifies in this step (the earlier one in a tie), and update the routing."""
    if routing is None:
        return jnp.argmax(sureness, axis=1).astype(jnp.int32), None
    chosen = _chosen(combine, routing)
    winner = jnp.argmax(jnp.where(chosen[:, None], routing.sureness, sureness), axis=1).astype(jnp.int32)
    counts = ~(chosen | done)
    return winner, Routing(routing.sureness + jnp.where(counts[:, None], sureness, 0.0), routing.steps + counts)


def still_needed(combine: Combine, routing: Routing, done: Bool[Array, " B"]) -> Bool[Array, " E"]:
    """Which drafts a row that is not done may still use. A draft that no row uses is never needed again."""
    drafts = jnp.arange(routing.sureness.shape[1])
    surest = jnp.argmax(routing.sureness, axis=1)[:, None] == drafts[None, :]
    return jnp.any(~done[:, None] & (surest | ~_chosen(combine, routing)[:, None]), axis=0)


def _chosen(combine: Combine, routing: Routing) -> Bool[Array, " B"]:
    return routing.steps >= combine.route_steps


def average_drafts(drafts: Mapping[str, Draft], weights: Sequence[float]) -> Draft:
    """Average drafts: every parameter is Σ weight · parameter over the drafts. The weights are not normalised.

    Weights that sum to 1 keep the parameters' scale; (1, 0, …) returns the first draft, bit for bit.

    Raises:
      ValueError: the drafts' shapes, rotary embeddings or vocabularies differ; names the difference.
    """
    configs = {name: draft.config for name, draft in drafts.items()}
    _check_equal(
        configs,
        lambda config: (
            {name: value for name, value in vars(config).items() if name not in ("decoder", "vocabulary")}
            | vars(config.decoder)
            | {"the draft vocabulary": config.vocabulary}
        ),
    )
    averaged = jax.tree.map(
        lambda *leaves: sum(weight * leaf for weight, leaf in zip(weights, leaves, strict=True)),
        *(draft.params for draft in drafts.values()),
    )
    return Draft(next(iter(configs.values())), averaged)


def check_one_target(drafts: Mapping[str, DraftConfig]) -> None:
    """Raise ValueError, naming the difference, if the drafts cannot belong to one target."""
    _check_equal(drafts, lambda config: {name: getattr(config.decoder, name) for name in ("vocab_size", "hidden_size", "rope")})


def _check_equal(drafts: Mapping[str, DraftConfig], facts: Callable[[DraftConfig], dict]) -> None:
    (first, config), *others = drafts.items()
    for name, other in others:
        other_facts = facts(other)
        for fact, value in facts(config).items():
            if value != other_facts[fact]:
                shown = [textwrap.shorten(str(x), 60, placeholder="…") for x in (value, other_facts[fact])]
                how = "differs further on" if shown[0] == shown[1] else f"is {' and '.join(shown)}"
                raise ValueError(f"drafts {first} and {name} cannot be combined: {fact} {how}")
