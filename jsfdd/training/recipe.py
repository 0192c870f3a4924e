"""The recipe of a draft: every setting that training depends on, besides the data and the seed."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args, get_origin, get_type_hints

from jsfdd.models.architecture import DraftKind, Eagle3Norm
from jsfdd.selection.tokens import TokenMetric

TokenLoss = Literal["cross_entropy", "reverse_kl", "total_variation", "hybrid"]
SoftTargets = Literal["auto", "means", "top_k", "none"]

# Field -> (test of a value, description of valid values).
_RULES = {
    "epochs": (lambda x: x >= 1, "1 or more"),
    "learning_rate": (lambda x: 0 < x < math.inf, "above 0 and finite"),
    "warmup_share": (lambda x: 0 <= x < 1, "a share of the run's steps in [0, 1)"),
    "max_grad_norm": (lambda x: x > 0, "above 0"),
    "soft_top_k": (lambda x: x >= 1, "1 or more"),
    "token_retain_ratio": (lambda x: 0 < x <= 1, "a share of the tokens in (0, 1]"),
    "draft_steps": (lambda x: 0 <= x <= 8, "from 1 to 8, or 0 for what suits the kind of draft"),
    "step_decay": (lambda x: x is None or 0 < x <= 1, "a factor in (0, 1]"),
    "hass_top_k": (lambda x: x >= 1, "1 or more"),
    "hass_top_k_weight": (lambda x: x >= 0, "0 (without) or more"),
    "accumulate": (lambda x: x >= 1, "1 or more"),
    "hidden_noise": (lambda x: x >= 0, "0 (no noise) or more"),
    "held_out_share": (lambda x: 0 <= x < 0.5, "a share of the samples in [0, 0.5)"),
    "log_every": (lambda x: x >= 1, "1 or more"),
    "save_every": (lambda x: x >= 1, "1 or more"),
    "draft_vocab": (lambda x: 0 <= x < 1 or x >= 1 and x == int(x), "0 (all tokens), a number of tokens, or a share below 1"),
}

# Fields that only Python can set: no experiment (experiments/LOG.md) showed a gain that would justify an option.
PYTHON_ONLY = (
    "warmup_share", "max_grad_norm", "hidden_weight", "token_weight", "token_metric", "token_weighting", "hass_top_k",
    "hass_top_k_weight", "compute_dtype", "hidden_noise", "log_every", "fc_bias", "step_decay", "target_layers", "eagle3_norms",
    "draft_head", "beyond_vocab", "accumulate", "soft_top_k",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the draft learns. Raises ValueError for invalid values."""

    draft_kind: DraftKind = "eagle"
    """What is trained: `eagle`, an EAGLE-1/2 draft, which reads the target's final state and borrows its head; or `eagle3`,
    which reads the inputs of three of the target's layers and has its own head."""
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
    """Soft targets to store before training, so that a step needs one product with the head less. `means`: the mean head
    vector of each counted token, for the same cross entropy; takes as much disk as final states. `top_k`: the likeliest
    tokens (32; other numbers in Python) with their probabilities, for any --token-loss; takes 4 to 6 bytes per stored token.
    `auto`: if hidden states are stored, means for cross_entropy, worth it from the third epoch, and top_k for an EAGLE-3
    draft, whose head is trained. `none`: nothing."""
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
    draft_steps: int = 0
    """Draft steps that training unrolls; each reads the draft's own states, as in decoding. HASS uses 3, EAGLE-3's
    training-time test 7. 0 means 1 for an EAGLE-1/2 draft and 3 for EAGLE-3."""
    step_decay: float | None = None
    """Step i has this to the power of i as its weight in the loss. By default 1 for EAGLE-1/2, as in HASS, and 0.8 for
    EAGLE-3."""
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
    draft_vocab: float = 0
    """Let the draft propose only this many tokens, the most frequent ones in its training answers, or (as in 0.995) as many as
    cover this share of them; 0 for all. Steps become cheaper, but other tokens are never accepted. Needs soft targets."""
    beyond_vocab: Literal["weigh", "drop", "keep"] = "weigh"
    """What happens to a token whose target distribution lies partly beyond the draft vocabulary. `weigh`: its weight in the
    loss is the probability within. `keep`: what lies within is scaled to sum to 1. `drop`: the same, and the token is left out
    if the target's likeliest token lies beyond, as EAGLE-3 does."""
    draft_head: Literal["trained", "frozen"] = "trained"
    """Whether an EAGLE-3 draft's head is trained, or stays as it begins: the target's rows."""
    target_layers: tuple[int, ...] = ()
    """The target's layers, counted from 0, whose inputs an EAGLE-3 draft reads. By default 2, N/2 and N-3 of N."""
    eagle3_norms: tuple[Eagle3Norm, ...] = ()
    """Which norms of EAGLE-3.1 the draft has; `models.draft.DraftConfig` explains them."""
    fc_bias: bool = False
    """Give the draft's fc a bias. vLLM silently drops it, so by default there is none."""

    def __post_init__(self):
        for name, (is_good, good) in _RULES.items():
            if not is_good(value := getattr(self, name)):
                raise ValueError(f"{_option(name)}: got {value!r}, but it must be {good}")
        for name, kind in get_type_hints(Recipe).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{_option(name)}: got {value!r}, but it must be one of {', '.join(get_args(kind))}")
            if kind is int and type(value) is not int:
                raise ValueError(f"{_option(name)}: got {value!r}, but it must be a whole number")
        if self.draft_kind == "eagle":
            for name in ("target_layers", "eagle3_norms"):
                if value := getattr(self, name):
                    raise ValueError(f"{name}: got {value!r}, which is of EAGLE-3 drafts; take draft_kind='eagle3'")
        if self.trains_head and self.soft_targets == "means":
            raise ValueError(
                "--soft-targets means know the target by its own head, and an EAGLE-3 draft's head learns: take top_k"
            )
        if self.soft_targets == "means" and self.token_loss != "cross_entropy":
            raise ValueError(f"--token-loss {self.token_loss} needs more of the target than --soft-targets means; take top_k")
        if self.stored_soft_targets(hidden_is_stored=True) == "top_k":
            if self.hass_top_k_weight and self.hass_top_k > self.soft_top_k:
                raise ValueError(f"hass_top_k: {self.hass_top_k} exceeds soft_top_k {self.soft_top_k}: no more is known")
        if self.draft_vocab and not self.stored_soft_targets(hidden_is_stored=True):
            raise ValueError("--draft-vocab trains on soft targets: take --soft-targets top_k, or means with cross_entropy")

    @property
    def unrolled(self) -> int:
        """The number of draft steps that training unrolls."""
        return self.draft_steps or {"eagle": 1, "eagle3": 3}[self.draft_kind]

    @property
    def step_weights(self) -> tuple[float, ...]:
        """Of each draft step in the loss."""
        decay = {"eagle": 1.0, "eagle3": 0.8}[self.draft_kind] if self.step_decay is None else self.step_decay
        return tuple(decay**i for i in range(self.unrolled))

    @property
    def trains_head(self) -> bool:
        """Whether the draft has a head that learns."""
        return self.draft_kind == "eagle3" and self.draft_head == "trained"

    @property
    def head_products(self) -> int:
        """Products of a visited token with the draft's head, forward and back, by its state and, if it learns, by the head."""
        return 3 if self.trains_head else 2

    def likeliest(self, vocabulary: int) -> int:
        """Tokens that `top_k` stores of each distribution over a vocabulary of so many: `soft_top_k`, or all."""
        return min(self.soft_top_k, vocabulary)

    @property
    def weighs_tokens(self) -> bool:
        """Whether some counted tokens weigh more than others, so that their scores are needed."""
        return self.token_retain_ratio < 1 or self.token_weighting == "soft"

    def stored_soft_targets(self, hidden_is_stored: bool) -> Literal["means", "top_k"] | None:
        """Resolve `soft_targets`. `auto` stores nothing if hidden states are not stored, as means are of the same size."""
        if self.soft_targets == "auto" and self.trains_head:
            return "top_k" if hidden_is_stored else None
        if self.soft_targets == "auto":
            return "means" if hidden_is_stored and self.token_loss == "cross_entropy" else None
        return None if self.soft_targets == "none" else self.soft_targets


def _option(name: str) -> str:
    """The name of a field for users: an option, or the field itself if only Python can set it."""
    return name if name in PYTHON_ONLY else "--" + name.replace("_", "-")
