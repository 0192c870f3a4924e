"""What one speculative step costs in plain steps, and so the τ from which a draft pays.

A plain step of the target emits one token. A speculative step drafts γ tokens, verifies them in one pass of the target and
emits τ tokens, so it is as fast as plain decoding where

    τ = cost of a speculative step ∕ cost of a plain step

On a CPU arithmetic takes the time, and a pass over γ + 1 tokens costs well over one. On an accelerator that decodes few rows,
memory does: a step costs the weights that it reads, which is what `memory_ratio` counts. That is a computed figure: it leaves
out the cache, the launch of programs and everything else that a real device spends.
"""

from __future__ import annotations

from collections.abc import Sequence

from jsfdd.base.numbers import decimals
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import DraftConfig
from jsfdd.models.flops import head_entries, input_matrices, layer_matrices


def measured_ratio(tau: float | None, speedup: float | None) -> float | None:
    """The cost of a speculative step in plain steps, of a draft's τ and its speedup; None where one was not measured.

    Example:
      >>> measured_ratio(1.5, 0.75)
      2.0
    """
    return tau / speedup if tau is not None and speedup else None


def memory_ratio(target: DecoderConfig, drafts: Sequence[DraftConfig], num_draft_tokens: int) -> float:
    """The same for a device that waits for memory and has every weight in one dtype: (weights that a speculative step reads) ∕
    (those of a plain step).

    A draft's layer and head are read for each token in a row or level of a tree. Of a mixture of experts it counts those that
    one token meets; several tokens meet more, and cost more than this says.
    """
    plain = target.num_layers * layer_matrices(target) + target.hidden_size * target.vocab_size
    drafted = 0
    for draft in drafts:
        once, each_step = input_matrices(draft)
        drafted += once + num_draft_tokens * (layer_matrices(draft.decoder) + each_step + head_entries(draft))
    return 1 + drafted / plain


def step_cost_words(tau: float | None, measured: float | None, memory: float) -> str:
    """The sentence that a person needs to judge a τ; empty where nothing was verified."""
    if tau is None or measured is None:
        return ""
    here = decimals(measured, 1)
    return (
        f"a speculative step costs {here} plain steps on this machine, so τ above {here} would pay; where memory is "
        f"what decoding waits for, as on a GPU, it costs {decimals(memory, 1)} (computed), and τ {decimals(tau)} makes "
        f"decoding {decimals(tau / memory)} times as fast"
    )
