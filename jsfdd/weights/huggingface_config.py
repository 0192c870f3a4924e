"""config.json to `DecoderConfig`, for every family that jsfdd computes, as transformers 4 and 5 write it.

What a file leaves out takes the family's default in transformers. A setting that would change the model and that no
field of `DecoderConfig` can hold is an error that names it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from jsfdd.models.architecture import DecoderConfig, Rope

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "mistral": "mistral", "gemma3_text": "gemma3"}
_WRAPPER = "gemma3"  # Gemma-3 with an image tower; its text_config is a gemma3_text
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_MAX_LAYERS = 10_000  # a corrupt count must not become a list of a billion layers

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",  # informative only
    },
}


class _Fields(NamedTuple):
    """One JSON object with typed access; `prefix` says where in the file it lies."""

    path: Path
    raw: dict[str, Any]
    prefix: str = ""

    def error(self, key: str, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {self.prefix}{key} {problem}")

    def positive(self, key: str, default: int | float | None) -> int | float:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise self.error(key, f"is {value!r}, not a positive number")
        return value

    def number(self, key: str, default: int | float | None = None) -> float:
        return float(self.positive(key, default))

    def integer(self, key: str, default: int | None = None, limit: int = 2**31 - 1) -> int:
        value = self.positive(key, default)
        if value != int(value) or value > limit:
            raise self.error(key, f"is {value!r}, not a whole number up to {limit}")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}, not true or false")
        return value

    def child(self, key: str) -> _Fields:
        value = self.raw.get(key)
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}, not an object")
        return _Fields(self.path, value, f"{self.prefix}{key}.")

    def refuse(self, key: str, harmless: tuple = (None, False)) -> None:
        value = self.raw.get(key)
        if value not in harmless:
            raise self.error(key, f"is {value!r}, which jsfdd does not compute")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError, or ValueError with the place where it is malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} a Hugging Face model directory?") from error
    except (ValueError, RecursionError) as error:  # also bad UTF-8 and numbers of thousands of digits
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def is_wrapped(directory: str | Path) -> bool:
    """Whether the decoder lies inside an image-and-text model (Gemma-3), its tensors under a prefix."""
    return read_json(Path(directory) / "config.json").get("model_type") == _WRAPPER


def read_config(directory: str | Path) -> DecoderConfig:
    """The decoder that a directory's config.json describes.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: malformed, or a model type, rope rule, activation, quantisation or switch that is not supported.
    """
    path = Path(directory) / "config.json"
    fields = _Fields(path, read_json(path))
    fields.refuse("quantization_config", harmless=(None,))
    if fields.raw.get("model_type") == _WRAPPER:
        text = fields.child("text_config")
        # The head belongs to the wrapper, and so does the switch that ties it.
        outer = {key: fields.raw[key] for key in ("tie_word_embeddings",) if key in fields.raw}
        fields = text._replace(raw={"model_type": "gemma3_text", **text.raw, **outer})
    return parse_decoder(*fields)


def parse_decoder(path: Path, raw: dict[str, Any], prefix: str = "") -> DecoderConfig:
    """The decoder that one JSON object describes; `path` and `prefix` say where it lies, for messages.

    Raises:
      ValueError: as in `read_config`.
    """
    fields = _Fields(path, raw, prefix)
    model_type = fields.raw.get("model_type")
    if model_type not in _FAMILIES:
        supported = ", ".join([*_FAMILIES, _WRAPPER])
        raise fields.error("model_type", f"is {model_type!r}; supported are {supported}")
    fields.refuse("quantization_config", harmless=(None,))
    if model_type in ("llama", "qwen3", "gemma3_text"):
        # It would also go on o_proj. Qwen2's biases (q, k and v only) belong to its type and have no switch.
        fields.refuse("attention_bias")
    if model_type == "llama":
        fields.refuse("mlp_bias")
    fields.refuse("partial_rotary_factor", harmless=(None, 1, 1.0))
    try:
        return _config(fields, model_type)
    except ValueError as error:
        # DecoderConfig checks what must hold between fields, but does not know the file.
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def _config(fields: _Fields, model_type: str) -> DecoderConfig:
    gemma = model_type == "gemma3_text"
    layers = fields.integer("num_hidden_layers", 26 if gemma else None, limit=_MAX_LAYERS)
    heads = fields.integer("num_attention_heads", 8 if gemma else None)
    width = fields.integer("hidden_size", 2304 if gemma else None)
    kv_default = {"llama": heads, "gemma3_text": 4}.get(model_type)
    head_default = {"qwen3": 128, "gemma3_text": 256}.get(model_type, width // heads)
    head_dim = fields.integer("head_dim", head_default)
    if head_dim % 2:
        raise fields.error("head_dim", f"is {head_dim}; rotary positions need an even one")
    rope, local_rope = _gemma_ropes(fields) if gemma else (_rope(fields), None)
    window, slides = _sliding(fields, model_type, layers)
    common = dict(
        family=_FAMILIES[model_type],
        vocab_size=fields.integer("vocab_size", 262_208 if gemma else None),
        hidden_size=width,
        intermediate_size=fields.integer("intermediate_size", 9216 if gemma else None),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", kv_default),
        head_dim=head_dim,
        max_position=_max_position(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings", gemma),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", "gemma3_text"),
        activation=_activation(fields, "hidden_activation" if gemma else "hidden_act"),
        sliding_window=window,
        sliding_layers=slides,
    )
    if not gemma:
        return DecoderConfig(**common)
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        fields.refuse(key)
    return DecoderConfig(
        **common,
        sandwich_norms=True,
        embedding_scale=width**0.5,
        query_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        local_rope=local_rope,
    )


def _max_position(fields: _Fields) -> int:
    default = 131_072 if fields.raw["model_type"] == "gemma3_text" else None
    return fields.integer("max_position_embeddings", default)


def _activation(fields: _Fields, key: str) -> str:
    default = "gelu_pytorch_tanh" if key == "hidden_activation" else "silu"
    name = fields.raw.get(key) or default
    if name not in _ACTIVATIONS:
        raise fields.error(key, f"is {name!r}; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _sliding(fields: _Fields, model_type: str, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and which layers slide, (None, ()) where none does."""
    if model_type == "llama":
        return None, ()  # transformers' Llama has no window, whatever its config.json says
    if model_type in ("qwen2", "qwen3") and not fields.flag("use_sliding_window"):
        return None, ()
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        return None, ()
    window = fields.integer("sliding_window", 4096)
    types = fields.raw.get("layer_types")
    if types is not None and model_type != "mistral":  # transformers' Mistral slides everywhere
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
            raise fields.error("layer_types", f"is {types!r}, not {layers} times {' or '.join(known)}")
        slides = tuple(kind == "sliding_attention" for kind in types)
    elif model_type == "gemma3_text":
        key = "_sliding_window_pattern" if "_sliding_window_pattern" in fields.raw else "sliding_window_pattern"
        pattern = fields.integer(key, 6)
        slides = tuple((layer + 1) % pattern != 0 for layer in range(layers))
    elif model_type == "mistral":
        slides = (True,) * layers
    else:
        full = fields.raw.get("max_window_layers", 28)  # 0 is a legal count
        if not isinstance(full, int):
            raise fields.error("max_window_layers", f"is {full!r}, not a whole number")
        slides = tuple(layer >= full for layer in range(layers))
    return (window, slides) if any(slides) else (None, ())


def _rope(fields: _Fields) -> Rope:
    """One rotation for all layers: transformers 5's rope_parameters, or rope_theta and rope_scaling before it."""
    theta = fields.number("rope_theta", 10_000.0)
    key = next((key for key in ("rope_scaling", "rope_parameters") if fields.raw.get(key)), None)
    return Rope(theta) if key is None else _scaled_rope(fields.child(key), theta, _max_position(fields))


def _gemma_ropes(fields: _Fields) -> tuple[Rope, Rope]:
    """Gemma-3's two rotations, of full and of sliding layers; scaling applies to the full ones only."""
    theta = fields.number("rope_theta", 1_000_000.0)
    local_theta = fields.number("rope_local_base_freq", 10_000.0)
    rope, local = Rope(theta), Rope(local_theta)
    if fields.raw.get("rope_scaling"):
        rope = _scaled_rope(fields.child("rope_scaling"), theta, _max_position(fields))
    elif fields.raw.get("rope_parameters"):
        both = fields.child("rope_parameters")
        if set(both.raw) - {"full_attention", "sliding_attention"}:
            raise fields.error("rope_parameters", "must hold full_attention and sliding_attention and nothing else")
        if both.raw.get("full_attention"):
            rope = _scaled_rope(both.child("full_attention"), theta, _max_position(fields))
        if both.raw.get("sliding_attention"):
            local = _scaled_rope(both.child("sliding_attention"), local_theta, _max_position(fields))
    return rope, local


def _scaled_rope(fields: _Fields, theta: float, max_position: int) -> Rope:
    kind = fields.raw.get("rope_type", fields.raw.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise fields.error("rope_type", f"is {kind!r}; supported are {', '.join(_ROPE_KEYS)}")
    fields.refuse("partial_rotary_factor", harmless=(None, 1, 1.0))
    unknown = set(fields.raw) - _ROPE_KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise fields.error(sorted(unknown)[0], f"is not a setting of {kind} rope that jsfdd knows")
    theta = fields.number("rope_theta", theta)
    if kind == "default":
        return Rope(theta)
    factor = fields.number("factor")
    original = fields.integer("original_max_position_embeddings", max_position)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return Rope(theta, "llama3", factor, low, high, original_max_position=original)
    fields.refuse("truncate", harmless=(None, True))
    attention = fields.number("attention_factor", _yarn_attention_factor(fields, factor))
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_position=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=attention,
    )


def _yarn_attention_factor(fields: _Fields, factor: float) -> float:
    """YaRN's factor on cos and sin: 0.1·ln(factor) + 1 (arXiv 2309.00071, §3.4), or a ratio of two such by mscale."""
    log = 0.1 * math.log(max(factor, 1.0))
    if fields.raw.get("mscale") and fields.raw.get("mscale_all_dim"):
        return (fields.number("mscale") * log + 1.0) / (fields.number("mscale_all_dim") * log + 1.0)
    return log + 1.0
