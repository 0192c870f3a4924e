"""How a draft learns: every number that training depends on, beside the data and the seed."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jsfdd.selection.tokens import TokenMetric

TokenLoss = Literal["cross_entropy", "reverse_kl", "total_variation", "hybrid"]
SoftTargets = Literal["auto", "means", "top_k", "none"]

# Field -> (test, what a good value is).
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

# Fields for Python alone: by experiments/LOG.md none of them earned a place on the command line.
PYTHON_ONLY = (
    "warmup_share", "max_grad_norm", "hidden_weight", "token_weight", "token_metric", "token_weighting", "hass_top_k",
    "hass_top_k_weight", "compute_dtype", "hidden_noise", "log_every", "fc_bias",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the draft learns. Raises ValueError for values that no training can have."""

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
    """Distance between the target's and the draft's next-token distributions. `cross_entropy` differs from KL by a constant;
    `total_variation` is the share of refused tokens; `hybrid` is the sum of both."""
    soft_targets: SoftTargets = "auto"
    """What is stored of the target's distributions before training, so that a step needs two products with the head in place
    of three. `means`: the mean head vector of each counted token, for the same cross entropy; as much disk as the hidden
    states. `top_k`: the likeliest --soft-top-k tokens with their probabilities, for any --token-loss; 4 to 6 bytes of disk a
    token of them. `auto`: means, where hidden states are stored and --token-loss is cross_entropy; they pay from the third
    epoch on. `none`: nothing."""
    soft_top_k: int = 32
    """Tokens that --soft-targets top_k stores of each distribution. All others then are one outcome, so the distance is at
    most the true one."""
    token_retain_ratio: float = 1.0
    """Share of the kept samples' counted tokens that are trained on: the flattest by --token-scores, or drawn at random without
    them. Each costs its part of the vocabulary projection, which is most of a step."""
    token_metric: TokenMetric = "flatness"
    """What decides which tokens are trained on."""
    token_weighting: Literal["hard", "soft"] = "hard"
    """Tokens that are trained on weigh 1 (hard), or as much as their metric, 1 on average (soft)."""
    hass_steps: int = 1
    """Draft steps that training unrolls, each reading the draft's own states as while decoding (HASS takes 3); 1 is EAGLE's."""
    hass_top_k: int = 10
    """Tokens in HASS's additional loss: the cross entropy over those that the target finds likeliest."""
    hass_top_k_weight: float = 0.0
    """Its weight beside the distance; HASS's second phase takes 1."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the draft's activations in training; its weights and the optimizer's stay float32."""
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
    step then costs as much less, and what the target says beyond them is never accepted. Needs soft targets."""
    fc_bias: bool = False
    """Give the draft's fc a bias. vLLM drops it without a word, so drafts have none unless asked."""

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
        """What `soft_targets` comes to. Means are as large as hidden states: where those are not stored, neither are they."""
        if self.soft_targets == "auto":
            return "means" if hidden_is_stored and self.token_loss == "cross_entropy" else None
        return None if self.soft_targets == "none" else self.soft_targets


def _option(name: str) -> str:
    """A field as its user knows it."""
    return name if name in PYTHON_ONLY else "--" + name.replace("_", "-")
