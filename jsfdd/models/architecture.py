"""The architecture of a decoder: sizes and switches, for every family that jsfdd reads.

One frozen dataclass covers Llama, Qwen2, Qwen3, Mistral and Gemma-3 targets, the mixtures of experts Qwen3-MoE and Mixtral,
and, with one layer, the EAGLE draft.
`weights/huggingface.py` and `weights/gguf.py` fill it from files; `models/layers.py` is the only code that computes with it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

DraftKind = Literal["eagle", "eagle3"]  # eagle: EAGLE-1 and EAGLE-2, which are one draft decoded in two ways
Eagle3Norm = Literal["norm_before_fc", "fc_norm", "norm_output", "norm_before_residual"]  # fields of a draft's config


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and the context-extension rule applied to it.

    `kind` selects the rule; the other fields carry Hugging Face's names and are read only by the rule that needs them.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 8192  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: None means 0.1·ln(factor) + 1
    frequency_divisors: tuple[float, ...] = ()  # [H/2] GGUF's rope_freqs: llama3's rule, already worked out


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in every layer: of `count` feed-forward blocks `chosen` read a token."""

    count: int  # E
    chosen: int  # k
    intermediate_size: int  # of one expert
    normalised: bool  # the weights of those chosen are divided by their sum

    def __post_init__(self):
        if self.chosen > self.count:
            raise ValueError(f"num_experts_per_tok={self.chosen} is more than num_experts={self.count}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and switches of one decoder-only transformer.

    Letters as in the docstrings: V vocab, D hidden, F feed-forward, L layers, N query heads, K key/value heads, H head dim.
    """

    family: Literal["llama", "qwen2", "qwen3", "mistral", "gemma3"]
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    max_position: int
    rms_norm_eps: float
    rope: Rope
    tie_embeddings: bool  # the head is the embedding matrix
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3, Gemma-3: RMSNorm over each head of q and k
    sandwich_norms: bool = False  # Gemma-3: a second RMSNorm after attention and after the MLP
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0  # Gemma-3: sqrt(D)
    query_scale: float | None = None  # None means H ** -0.5; Gemma-3: query_pre_attn_scalar ** -0.5
    sliding_window: int | None = None  # keys further back than this are masked in sliding layers
    sliding_layers: tuple[bool, ...] = ()  # [L] which layers slide; empty means none
    local_rope: Rope | None = None  # Gemma-3: sliding layers rotate with this one instead
    experts: Experts | None = None  # Qwen3-MoE, Mixtral: in the place of the MLP

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(f"sliding_layers has {len(self.sliding_layers)} entries for {self.num_layers} layers")
        if any(self.sliding_layers) and self.sliding_window is None:
            raise ValueError("sliding_layers is set but sliding_window is None")
