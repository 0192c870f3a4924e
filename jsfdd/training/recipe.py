"""How a draft learns: every number that training depends on, beside the data and the seed."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jsfdd.selection.tokens import TokenMetric

TokenLoss = Literal["cross_entropy", "reverse_kl", "total_variation", "hybrid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the draft learns."""

    epochs: int = 10
    """Passes over the kept samples. The learning-rate schedule is scaled to the run's own number of steps."""
    learning_rate: float = 5e-4
    """Peak of AdamW(0.9, 0.95): linear warm-up, then linear decay to a tenth."""
    warmup_share: float = 0.05
    """Share of the steps that warm up."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this global norm."""
    hidden_weight: float = 1.0
    """Weight of SmoothL1 between predicted and true hidden states."""
    token_weight: float = 0.1
    """Weight of the distance between the target's and the draft's next-token distributions."""
    token_loss: TokenLoss = "cross_entropy"
    """That distance. `cross_entropy` differs from KL by a constant; `total_variation` is the share of refused tokens; `hybrid`
    is the sum of both."""
    target_means: Literal["auto", "store", "none"] = "auto"
    """`store` keeps the target's mean head vector of every token that counts, computed once: a step then needs two products
    with the head in place of three, for the same cross entropy. It doubles the disk that hidden states take, and pays from the
    third epoch on. `auto` stores them where hidden states are stored, --token-loss is cross_entropy and --target-top-k is 0."""
    target_top_k: int = 0
    """Keep, in place of means, this many of the likeliest tokens of every distribution of the target, with their probabilities:
    two products as well, for any --token-loss, at 4 to 6 bytes of disk each. All other tokens then are one outcome, so the
    distance is at most the true one."""
    token_retain_ratio: float = 1.0
    """Share of the kept samples' counted tokens that are trained on: those of the highest `token_metric`. Each costs its part
    of the vocabulary projection, which is most of a step. Below 1 it needs --token-scores."""
    token_metric: TokenMetric = "flatness"
    """What decides which tokens are trained on, and what soft weights are in proportion to."""
    token_weighting: Literal["hard", "soft"] = "hard"
    """Tokens that are trained on weigh 1 (hard), or as much as their metric, 1 on average (soft)."""
    hass_steps: int = 1
    """Draft steps that training unrolls, each reading the draft's own states as while decoding (HASS takes 3); 1 is EAGLE's."""
    hass_top_k: int = 10
    """Tokens in HASS's additional loss: the cross entropy over those that the target finds likeliest."""
    hass_top_k_weight: float = 0.0
    """Its weight beside the distance; HASS's second phase takes 1."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the draft's activations while it trains; its weights and the optimizer's stay float32."""
    accumulate: int = 1
    """Batches whose gradients are added up before one optimizer step."""
    hidden_noise: float = 0.2
    """Width of the uniform noise on the input hidden states, scaled by 512 / length as EAGLE does; 0 for none."""
    held_out_share: float = 0.05
    """Share of the samples on which agreement with the target is measured and never trained."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""
    draft_vocab: int = 0
    """Let the draft propose only this many tokens, those that the answers it is trained on have most often; 0 for all. Each
    step then costs as much less, and what the target says beyond them is never accepted. Needs target means or
    --target-top-k."""
    fc_bias: bool = False
    """Give the draft's fc a bias. vLLM drops it without a word, so drafts have none unless asked."""

    def __post_init__(self):
        if self.target_means == "store" and self.token_loss != "cross_entropy":
            raise ValueError(f"--token-loss {self.token_loss} needs all of the target's distribution, not --target-means store")
        if not self.target_top_k:
            return
        if self.target_means == "store":
            raise ValueError("--target-means store and --target-top-k store two things for one purpose; choose one")
        if 0 < self.draft_vocab < self.target_top_k:
            raise ValueError(f"--target-top-k: {self.target_top_k} exceeds the {self.draft_vocab} tokens of --draft-vocab")
        if self.hass_top_k_weight and self.hass_top_k > self.target_top_k:
            raise ValueError(f"--hass-top-k: {self.hass_top_k} exceeds --target-top-k {self.target_top_k}: no more is known")

    @property
    def weighs_tokens(self) -> bool:
        """Whether some counted tokens weigh more than others, so that their scores are needed."""
        return self.token_retain_ratio < 1 or self.token_weighting == "soft"
