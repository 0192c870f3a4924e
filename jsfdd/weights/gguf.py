"""Read a GGUF file into `DecoderConfig` and the params tree: architectures llama (also of Mistral and Mixtral), qwen2, qwen3,
qwen3moe and gemma3."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jsfdd.models.architecture import DecoderConfig, Experts, Rope
from jsfdd.weights.gguf_file import GGUFFile, read_tensor
from jsfdd.weights.layout import Index, Source, fill_params

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3", "gemma3": "gemma3"}
_MAX_LAYERS = 10_000  # a corrupt count must not become a list of a billion layers
_MAX_EXPERTS = 10_000
_ROPE_DIVISORS = "rope_freqs.weight"
_STACKED = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight")
_SOFTMAX = 1  # of the functions that weigh experts

_NAMES = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
    "layers/input_norm/scale": "blk.{}.attn_norm.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/post_attention_norm/scale": "blk.{}.post_attention_norm.weight",
    "layers/post_mlp_norm/scale": "blk.{}.post_ffw_norm.weight",
    "layers/attention/q_proj/kernel": "blk.{}.attn_q.weight",
    "layers/attention/k_proj/kernel": "blk.{}.attn_k.weight",
    "layers/attention/v_proj/kernel": "blk.{}.attn_v.weight",
    "layers/attention/o_proj/kernel": "blk.{}.attn_output.weight",
    "layers/attention/q_proj/bias": "blk.{}.attn_q.bias",
    "layers/attention/k_proj/bias": "blk.{}.attn_k.bias",
    "layers/attention/v_proj/bias": "blk.{}.attn_v.bias",
    "layers/attention/q_norm/scale": "blk.{}.attn_q_norm.weight",
    "layers/attention/k_norm/scale": "blk.{}.attn_k_norm.weight",
    "layers/mlp/gate_proj/kernel": "blk.{}.ffn_gate.weight",
    "layers/mlp/up_proj/kernel": "blk.{}.ffn_up.weight",
    "layers/mlp/down_proj/kernel": "blk.{}.ffn_down.weight",
    "layers/mlp/router/kernel": "blk.{}.ffn_gate_inp.weight",
    "layers/mlp/gate_experts/kernel": "blk.{}.ffn_gate_exps.weight[{}]",  # see `_sources`
    "layers/mlp/up_experts/kernel": "blk.{}.ffn_up_exps.weight[{}]",
    "layers/mlp/down_experts/kernel": "blk.{}.ffn_down_exps.weight[{}]",
}


def read_config(file: GGUFFile) -> DecoderConfig:
    """The decoder that a GGUF file's metadata describes.

    Raises:
      ValueError: an architecture or setting that is not supported.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise ValueError(f"{file.path}: general.architecture is {architecture!r}; supported are {', '.join(_FAMILIES)}")
    family = _FAMILIES[architecture]
    # No field of DecoderConfig computes these; ignoring one would silently change the model.
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "attention.scale", "rope.scale_linear"):
        if file.metadata.get(f"{architecture}.{key}"):
            raise ValueError(f"{file.path}: metadata key {architecture}.{key} is set: not supported")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: tensor token_embd.weight is missing")
    layers = _integer(file, "block_count", limit=_MAX_LAYERS)
    width = _integer(file, "embedding_length")
    heads = _integer(file, "attention.head_count")
    head_dim = _integer(file, "attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(file, key, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {architecture}.{key} differs from the head dimension {head_dim}: not supported")
    if head_dim % 2:
        raise ValueError(f"{file.path}: head dimension {head_dim} is odd; rotary positions need an even one")
    gemma = family == "gemma3"
    window, slides = _sliding(file, layers)
    common = dict(
        family=family,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=_integer(file, "feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_integer(file, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=_integer(file, "context_length"),
        rms_norm_eps=_number(file, "attention.layer_norm_rms_epsilon"),
        rope=_rope(file, head_dim),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3"),
        sliding_window=window,
        sliding_layers=slides,
    )
    if gemma:
        # The file does not say how queries are scaled. It is by the head dimension, except for D/N in the 62-layer model (27B).
        scaled_by = width / heads if layers == 62 else head_dim
        common |= dict(
            sandwich_norms=True,
            activation="gelu_tanh",
            embedding_scale=width**0.5,
            query_scale=scaled_by**-0.5,
            local_rope=Rope(_number(file, "rope.freq_base_swa", 10_000.0)),
        )
    try:
        return DecoderConfig(**common, experts=_experts(file))
    except ValueError as error:
        # DecoderConfig checks what must hold between fields, but does not know the file.
        raise error if str(file.path) in str(error) else ValueError(f"{file.path}: {error}") from error


def read_params(file: GGUFFile, config: DecoderConfig, dtype=np.float32, mesh: Mesh | None = None, layers: bool = True) -> dict:
    """The params tree of a GGUF file's weights, dequantised, as JAX arrays of `dtype` (layout: `layout.fill_params`).

    With a `mesh` each device is given its share. Without `layers`, only the embedding, the final norm and the head.

    Raises:
      ValueError: a tensor is missing, unknown, misshapen or of a type that cannot be dequantised.
    """
    transforms = {}
    if file.metadata["general.architecture"] == "llama":
        # llama.cpp rotates neighbouring pairs in this architecture, so its files hold q's and k's rows interleaved.
        transforms = {
            "layers/attention/q_proj/kernel": functools.partial(_deinterleave, heads=config.num_heads),
            "layers/attention/k_proj/kernel": functools.partial(_deinterleave, heads=config.num_kv_heads),
        }
    sources = _sources(file)
    if not layers:
        sources = {name: source for name, source in sources.items() if not name.startswith("blk.")}
    return fill_params(config, _NAMES, sources, dtype, file.path, transforms, mesh, layers)


def _sources(file: GGUFFile) -> dict[str, Source]:
    """A source for every tensor that is a parameter; of experts, which are stacked in one tensor [E, out, in], one for each."""
    sources = {}
    for name, tensor in file.tensors.items():
        if _STACKED.fullmatch(name) and len(tensor.shape) == 3:
            count, out, width = tensor.shape
            rows = file._replace(tensors={name: tensor._replace(shape=(count * out, width))})
            for expert in range(min(count, _MAX_EXPERTS)):
                read = functools.partial(_read_expert, rows, name, expert * out)
                sources[f"{name}[{expert}]"] = Source(tensor.path, (out, width), read)
        elif name != _ROPE_DIVISORS:  # part of the config
            sources[name] = Source(tensor.path, tensor.shape, functools.partial(_read, file, name))
    return sources


def _read(file: GGUFFile, name: str, index: Index) -> np.ndarray:
    rows, *rest = index
    return read_tensor(file, name, rows)[(slice(None), *rest)]


def _read_expert(file: GGUFFile, name: str, first: int, index: Index) -> np.ndarray:
    rows, columns = index
    return _read(file, name, (slice(first + rows.start, first + rows.stop), columns))


def _deinterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """[N·H, D] with each head's rows as pairs (0, H/2), (1, H/2 + 1), … back in order 0 … H−1."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _experts(file: GGUFFile) -> Experts | None:
    """The mixture of experts, if there is one. In both architectures that have them the weights of those chosen sum to 1.

    Raises:
      ValueError: experts that all tokens read, or weights that are no softmax or scaled.
    """
    architecture = file.metadata["general.architecture"]
    if architecture != "qwen3moe" and not file.metadata.get(f"{architecture}.expert_count"):
        return None
    computed = {"expert_shared_count": (0,), "expert_weights_scale": (0, 1), "expert_gating_func": (0, _SOFTMAX)}
    computed |= {"expert_group_count": (0, 1), "expert_weights_norm": (True,)}
    for key, values in computed.items():
        value = file.metadata.get(f"{architecture}.{key}", values[0])
        if value not in values:
            raise ValueError(f"{file.path}: metadata key {architecture}.{key} is {value!r}: not supported")
    return Experts(
        count=_integer(file, "expert_count", limit=_MAX_EXPERTS),
        chosen=_integer(file, "expert_used_count"),
        intermediate_size=_integer(file, "expert_feed_forward_length", _integer(file, "feed_forward_length")),
        normalised=True,
    )


def _sliding(file: GGUFFile, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and which layers slide: all of Mistral's, five of six of Gemma-3's; (None, ()) without a window."""
    family = file.metadata["general.architecture"]
    if not file.metadata.get(f"{family}.attention.sliding_window"):
        return None, ()
    window = _integer(file, "attention.sliding_window")
    if family == "gemma3":
        pattern = _integer(file, "attention.sliding_window_pattern", 6)
        return window, tuple((layer + 1) % pattern != 0 for layer in range(layers))
    if family == "llama":
        return window, (True,) * layers
    raise ValueError(f"{file.path}: {family}.attention.sliding_window is set, but not which layers slide: not supported")


def _rope(file: GGUFFile, head_dim: int) -> Rope:
    family = file.metadata["general.architecture"]
    theta = _number(file, "rope.freq_base", 1_000_000.0 if family == "gemma3" else 10_000.0)
    kind = file.metadata.get(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return Rope(theta, frequency_divisors=_rope_divisors(file, head_dim))
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{file.path}: {family}.rope.scaling.type is {kind!r}; supported are none, linear, yarn")
    factor = _number(file, "rope.scaling.factor")
    divisors = _rope_divisors(file, head_dim)
    if kind == "linear":
        return Rope(theta, "linear", factor, frequency_divisors=divisors)
    # llama.cpp multiplies YaRN's own 0.1·ln(factor) + 1 by this one, 1 unless the file says otherwise.
    own_factor = _number(file, "rope.scaling.yarn_attn_factor", _number(file, "rope.scaling.attn_factor", 1.0))
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_position=_integer(file, "rope.scaling.original_context_length", _integer(file, "context_length")),
        beta_fast=_number(file, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_number(file, "rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=own_factor * (0.1 * math.log(factor) + 1.0),
        frequency_divisors=divisors,
    )


def _rope_divisors(file: GGUFFile, head_dim: int) -> tuple[float, ...]:
    """Llama-3's rope scaling, which these files hold as one divisor per frequency."""
    if _ROPE_DIVISORS not in file.tensors:
        return ()
    divisors = read_tensor(file, _ROPE_DIVISORS)
    if divisors.shape != (head_dim // 2,) or not (divisors > 0).all():
        raise ValueError(
            f"{file.path}: tensor {_ROPE_DIVISORS} has shape {list(divisors.shape)}; {head_dim // 2} positive numbers "
            "were expected"
        )
    return tuple(float(divisor) for divisor in divisors)


def _value(file: GGUFFile, key: str, default: Any) -> Any:
    """Read a positive number of this architecture's metadata; a list that repeats one number counts as that number."""
    full = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(full, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if value is None:
        raise ValueError(f"{file.path}: metadata key {full} is missing")
    if isinstance(value, (bool, str, list)) or not 0 < value < math.inf:
        raise ValueError(f"{file.path}: metadata key {full} is {value!r}, not one positive number for all layers")
    return value


def _integer(file: GGUFFile, key: str, default: int | None = None, limit: int = 2**31 - 1) -> int:
    value = _value(file, key, default)
    if value != int(value) or value > limit:
        raise ValueError(f"{file.path}: metadata key {key} is {value!r}, not a whole number up to {limit}")
    return int(value)


def _number(file: GGUFFile, key: str, default: float | None = None) -> float:
    return float(_value(file, key, default))
