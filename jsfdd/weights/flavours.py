"""What each flavour of an exported draft can represent. Other drafts are refused, naming the field.

    EAGLE-1/2
    eagle          SafeAILab/EAGLE. "bias" says whether fc has one; heads of D / N; of rope scalings only "linear", and with
                   that only theta 10,000.
    vllm           vLLM, method "eagle". No fc bias: it would be dropped without a word.
    sglang         SGLang, algorithm EAGLE. fc.bias is always there; "bias" is the attention's; no attention_factor is read.
    speculators    speculators 0.1 to 0.4. Settings are nested, tensors have other names, the target's name is written.

    EAGLE-3        layers               norms                       rope scaling             tensors
    eagle          2, N/2, N-3          none                        as of EAGLE-1/2          midlayer.*
    vllm           any                  all                         all                      midlayer.*
    sglang         any                  no norm_before_residual     no attention_factor      midlayer.*
    speculators    any three            all                         all                      layers.0.*
    tpu-inference  2, N/2, N-3          norm_before_residual only   llama3                   midlayer.*, d2t always
    sglang-jax     2, N/2, N-3          none                        llama3, yarn             midlayer.*, d2t always

No EAGLE-1/2 layout says which tokens a draft with a small head proposes: `weights/draft_vocabulary.py` puts a file beside it.
No engine's EAGLE-3 draft has an fc bias: "bias" gives SGLang's attention biases that no file fills.
"""

from __future__ import annotations

import math
from typing import NoReturn

from jsfdd.models.architecture import Rope
from jsfdd.models.draft import DraftConfig
from jsfdd.weights.card import Flavour, Serving
from jsfdd.weights.eagle3_settings import NORM_FLAGS

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # as config.json calls them
_EAGLE_THETA = 10_000.0  # what EAGLE's scaled rotations use, whatever config.json says

# EAGLE-3: the norms that a flavour's engine computes, and the flavours that read no layers from the draft's files.
_NORMS = {
    "eagle": (),
    "vllm": NORM_FLAGS,
    "sglang": ("norm_before_fc", "fc_norm", "norm_output"),
    "speculators": NORM_FLAGS,
    "tpu-inference": ("norm_before_residual",),
    "sglang-jax": (),
}
_FIXED_LAYERS = ("eagle", "tpu-inference", "sglang-jax")
# Both kinds: the rope scalings that an engine computes as transformers does.
_SCALINGS = {
    "eagle": ("linear",),
    "vllm": ("linear", "llama3", "yarn"),
    "sglang": ("linear", "llama3", "yarn"),
    "speculators": ("linear", "llama3", "yarn"),
    "tpu-inference": ("llama3",),
    "sglang-jax": ("llama3", "yarn"),
}
_NO_ATTENTION_FACTOR = ("sglang", "sglang-jax")
_SILU_ONLY = ("vllm", "sglang", "speculators", "sglang-jax")


def check_flavour(config: DraftConfig, flavour: Flavour, serving: Serving) -> None:
    """Raise ValueError, naming the field and a remedy, if a flavour cannot represent a draft."""
    d, rope = config.decoder, config.decoder.rope
    if d.embedding_scale != 1.0:
        _refuse(
            flavour,
            "embedding_scale",
            f"this target scales its embeddings by {d.embedding_scale:g}, for which no engine's EAGLE layout has a place; "
            "such a draft can only be used from its checkpoint",
        )
    if rope.frequency_divisors:
        _refuse(
            flavour,
            "rope",
            "this target's GGUF stores its rope scaling as a table of divisors, which config.json cannot hold; train with "
            "the target's Hugging Face directory instead",
        )
    if flavour == "eagle" and d.head_dim * d.num_heads != d.hidden_size:
        _refuse(
            flavour, "head_dim", f"{d.num_heads} heads of {d.head_dim} are not hidden_size {d.hidden_size}; use vllm or sglang"
        )
    if rope.kind != "default" and rope.kind not in _SCALINGS[flavour]:
        _refuse(flavour, "rope_scaling", f"its engine computes no {rope.kind} scaling as it was trained; use vllm or sglang")
    if flavour == "eagle" and rope.kind == "linear" and rope.theta != _EAGLE_THETA:
        _refuse(flavour, "rope_theta", f"with scaling EAGLE's own code takes 10000, not {rope.theta:g}; use vllm or sglang")
    if flavour in _NO_ATTENTION_FACTOR and rope.kind == "yarn" and not _is_default_attention(rope):
        _refuse(flavour, "attention_factor", f"its engine reads none, and this rope's is {rope.attention_factor:g}; use vllm")
    if flavour == "speculators" and serving.target_name is None:
        _refuse(
            flavour,
            "verifier.name_or_path",
            f"it names the target by a hub name or a Hugging Face directory, not {serving.target!r}; give --target",
        )
    (_check_eagle if config.kind == "eagle" else _check_eagle3)(config, flavour)


def _check_eagle(config: DraftConfig, flavour: Flavour) -> None:
    d = config.decoder
    if flavour in ("tpu-inference", "sglang-jax"):
        _refuse(
            flavour,
            "kind",
            "its engine serves EAGLE-3 drafts only, and this one is of EAGLE-1/2; train one with --draft-kind eagle3",
        )
    if flavour == "vllm" and config.fc_bias:
        _refuse(flavour, "fc_bias", "vLLM drops an fc bias without a word, so τ would fall; train without it, or use sglang")
    if flavour in ("sglang", "speculators") and d.qkv_bias:
        _refuse(flavour, "qkv_bias", "its one switch would put a bias on o_proj too; use eagle or vllm")
    if flavour in ("vllm", "sglang") and d.activation != "silu":
        _refuse(flavour, "hidden_act", f"it computes silu only, not {ACTIVATIONS[d.activation]}; use eagle")


def _check_eagle3(config: DraftConfig, flavour: Flavour) -> None:
    d, layers = config.decoder, config.target_layers
    if config.fc_bias:
        _refuse(flavour, "fc_bias", "no engine's EAGLE-3 draft has one; train without it")
    if d.qkv_bias:
        _refuse(flavour, "qkv_bias", "no engine's EAGLE-3 draft has one without a bias on o_proj")
    for flag in NORM_FLAGS:
        if getattr(config, flag) and flag not in _NORMS[flavour]:
            able = ", ".join(name for name, flags in _NORMS.items() if flag in flags)
            _refuse(flavour, flag, f"its engine overlooks it, so τ would fall; use {able}, or train without it")
    if flavour in _FIXED_LAYERS and not is_default(layers):
        _refuse(
            flavour,
            "target_layers",
            f"its engine gives a draft what enters layers 2, N/2 and N-3 of N, and this one reads {list(layers)}; use vllm or "
            "sglang",
        )
    if flavour == "speculators" and len(layers) != 3:
        _refuse(flavour, "target_layers", f"vLLM takes three in this format, and this draft reads {len(layers)}; use vllm")
    if flavour in _SILU_ONLY and d.activation != "silu":
        _refuse(flavour, "hidden_act", f"its engine computes silu only, not {ACTIVATIONS[d.activation]}")


def is_default(layers: tuple[int, ...]) -> bool:
    """Whether these layers are 2, N // 2 and N − 3 of some number of layers N."""
    number = layers[-1] + 3
    return layers == (2, number // 2, number - 3)


def _refuse(flavour: Flavour, field: str, why: str) -> NoReturn:
    raise ValueError(f"--flavour {flavour} cannot represent this draft: {field}: {why}")


def _is_default_attention(rope: Rope) -> bool:
    """Whether YaRN's attention factor is the one that every engine computes by default."""
    default = 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
    return rope.attention_factor is None or math.isclose(rope.attention_factor, default, rel_tol=1e-6)
