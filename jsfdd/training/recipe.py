"""The recipe of a draft: every setting that training depends on, besides the data and the seed."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jsfdd.selection.tokens import TokenMetric

TokenLoss = Literal["cross_entropy", "reverse_kl", "total_variation", "hybrid"]
SoftTargets = Literal["auto", "means", "top_k", "none"]

# Field -> (test of a value, description of valid values).
_RULES = {
    "epochs": (lambda x: x >= 1, "1 or more"),
    "learning_rate": (lambda x: x > 0, "above 0"),
    "warmup_share": (lambda x: 0 <= x < 1, "a share of the run's steps in [0, 1)"),
    "max_grad_norm": (lambda x: x > 0, "above 0"),
    "soft_top_k": (lambda x: x >= 1, "1 or more"),
    "token_retain_ratio": (lambda x: 0 < x <= 1, "a share of the tokens in (0, 1]"),
    "hass_steps": (lambda x: 1 <= x <= 8, "from 1 to 8"),
    "hass_top_k": (lambda x: x >= 1, "1 or more"),
    "hass_top_k_weight": (lambda x: x >= 0, "0 (without) or more"),
    "accumulate": (lambda x: x >= 1, "1 or more"),
    "hidden_noise": (lambda x: x >= 0, "0 (no noise) or more"),
    "held_out_share": (lambda x: 0 <= x < 0.5, "a share of the samples in [0, 0.5)"),
    "log_every": (lambda x: x >= 1, "1 or more"),
    "save_every": (lambda x: x >= 1, "1 or more"),
    "draft_vocab": (lambda x: x >= 0, "0 (all tokens) or more"),
}

# Fields that only Python can set: no experiment (experiments/LOG.md) showed a gain that would justify an option.
PYTHON_ONLY = (
    "warmup_share", "max_grad_norm", "hidden_weight", "token_weight", "token_metric", "token_weighting", "hass_top_k",
    "hass_top_k_weight", "compute_dtype", "hidden_noise", "log_every", "fc_bias",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the draft learns. Raises ValueError for invalid values."""

    epochs: int = 10
    """Passes over the kept samples. The learning-rate schedule is scaled to the number of steps."""
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
    """Distance between the target's and the draft's next-token distributions. `cross_entropy` differs from KL by a constant;
    `total_variation` is the share of rejected tokens; `hybrid` is the sum of both."""
    soft_targets: SoftTargets = "auto"
    """Soft targets to store before training, so that a step needs two products with the head instead of three. `means`: the
    mean head vector of each counted token, for the same cross entropy; takes as much disk as hidden states. `top_k`: the
    likeliest --soft-top-k tokens with their probabilities, for any --token-loss; takes 4 to 6 bytes per stored token. `auto`:
    means, if hidden states are stored and --token-loss is cross_entropy; worth it from the third epoch. `none`: nothing."""
    soft_top_k: int = 32
    """Tokens per distribution that --soft-targets top_k stores. All other tokens become one outcome, so the distance is a lower
    bound of the true one."""
    token_retain_ratio: float = 1.0
    """Share of the kept samples' counted tokens to train on: the flattest by --token-scores, or random ones without it. The
    vocabulary projection, most of a step, runs only on these tokens."""
    token_metric: TokenMetric = "flatness"
    """The token score that selects the tokens to train on."""
    token_weighting: Literal["hard", "soft"] = "hard"
    """Weights of the tokens to train on: 1 (hard), or in proportion to their metric with mean 1 (soft)."""
    hass_steps: int = 1
    """Draft steps that training unrolls; each reads the draft's own states, as in decoding (HASS uses 3). 1 is EAGLE's
    training."""
    hass_top_k: int = 10
    """Tokens in HASS's additional loss, the cross entropy over the target's likeliest tokens."""
    hass_top_k_weight: float = 0.0
    """Weight of HASS's additional loss; HASS's second phase uses 1."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the draft's activations in training. Its weights and the optimizer's state stay float32."""
    accumulate: int = 1
    """Batches whose gradients are added up before one optimizer step."""
    hidden_noise: float = 0.2
    """Width of the uniform noise on the input hidden states, scaled by 512 / length as EAGLE does; 0 for none."""
    held_out_share: float = 0.05
    """Share of the samples to hold out: they measure agreement with the target, and are never trained on."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""
    draft_vocab: int = 0
    """Let the draft propose only this many tokens, the most frequent ones in its training answers; 0 for all. Steps become
    cheaper, but other tokens are never accepted. Needs soft targets."""
    fc_bias: bool = False
    """Give the draft's fc a bias. vLLM silently drops it, so by default there is none."""

    def __post_init__(self):
        for name, (is_good, good) in _RULES.items():
            if not is_good(value := getattr(self, name)):
                raise ValueError(f"{_option(name)}: got {value!r}, but it must be {good}")
        if self.soft_targets == "means" and self.token_loss != "cross_entropy":
            raise ValueError(f"--token-loss {self.token_loss} needs more of the target than --soft-targets means; take top_k")
        if self.soft_targets == "top_k":
            if 0 < self.draft_vocab < self.soft_top_k:
                raise ValueError(f"--soft-top-k: {self.soft_top_k} exceeds the {self.draft_vocab} tokens of --draft-vocab")
            if self.hass_top_k_weight and self.hass_top_k > self.soft_top_k:
                raise ValueError(f"hass_top_k: {self.hass_top_k} exceeds --soft-top-k {self.soft_top_k}: no more is known")
        if self.draft_vocab and not self.stored_soft_targets(hidden_is_stored=True):
            raise ValueError("--draft-vocab trains on soft targets: take --soft-targets top_k, or means with cross_entropy")

    @property
    def weighs_tokens(self) -> bool:
        """Whether some counted tokens weigh more than others, so that their scores are needed."""
        return self.token_retain_ratio < 1 or self.token_weighting == "soft"

    def stored_soft_targets(self, hidden_is_stored: bool) -> Literal["means", "top_k"] | None:
        """Resolve `soft_targets`. `auto` stores no means if hidden states are not stored, as both are of the same size."""
        if self.soft_targets == "auto":
            return "means" if hidden_is_stored and self.token_loss == "cross_entropy" else None
        return None if self.soft_targets == "none" else self.soft_targets


def _option(name: str) -> str:
    """The name of a field for users: an option, or the field itself if only Python can set it."""
    return name if name in PYTHON_ONLY else "--" + name.replace("_", "-")
