"""Read config.json into `DecoderConfig`, for every supported family.

transformers fills in missing settings, and knows every spelling that its versions have used (rope_scaling and
rope_parameters, window patterns and layer_types). This file reads the result, and refuses what jsfdd does not support: a
setting that would change the model, but that no field of `DecoderConfig` can hold, is an error that names it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from jsfdd.base.files import check_no_pointer, read_json
from jsfdd.models.architecture import DecoderConfig, Experts, Rope
from jsfdd.weights import fp8

_FAMILIES = {
    **{"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "mistral": "mistral", "gemma3_text": "gemma3"},
    **{"qwen3_moe": "qwen3", "mixtral": "mistral"},
    **{"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"},
}
# Models of images and text, and the type of the text_config that is their decoder. Older files have its fields outside.
_WRAPPERS = {
    **{"gemma3": "gemma3_text", "mistral3": "mistral"},
    **{kind: f"{kind}_text" for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
}
_OF_IMAGES = ("mrope_section", "mrope_interleaved")  # which part of a rotation follows which coordinate: of text all are one
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_MAX_LAYERS = 10_000  # a corrupt count must not become a list of a billion layers
_MAX_EXPERTS = 10_000

# Sizes for which transformers would take those of one early model of the family. Only Gemma's own files leave them out.
_STATED = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings".split()
_STATED_OF_EXPERTS = {
    "qwen3_moe": ("num_experts_per_tok", "moe_intermediate_size"),
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
}
# transformers sees only these fields of a file, so it checks no setting that does not concern the decoder.
_SHOWN = [
    *_STATED,
    *"num_key_value_heads head_dim hidden_act hidden_activation rms_norm_eps tie_word_embeddings".split(),
    *"query_pre_attn_scalar rope_theta rope_local_base_freq rope_scaling rope_parameters layer_types".split(),
    *"sliding_window use_sliding_window max_window_layers sliding_window_pattern _sliding_window_pattern".split(),
    *"num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob".split(),
]
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": set("factor low_freq_factor high_freq_factor original_max_position_embeddings".split()),
    # "finetuned" is informative only.
    "yarn": set(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate "
        "finetuned".split()
    ),
}

# Of the models of other types: whose norms multiply by 1 + w, and settings that scale what the head or the embedding gives.
_ADDS_ONE = ("gemma", "qwen3_next", "qwen3_5")
_SCALES_OF_ENDS = (
    "final_logit_softcapping logits_scaling logit_scale lm_head_multiplier logits_mup_width_multiplier embedding_multiplier "
    "scale_emb dim_model_base"
).split()


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
            raise self.error(key, f"is {value!r:.80}, not a positive number")
        return value

    def number(self, key: str, default: int | float | None = None) -> float:
        return float(self.positive(key, default))

    def integer(self, key: str, default: int | None = None, limit: int = 2**31 - 1) -> int:
        value = self.positive(key, default)
        if value != int(value) or value > limit:
            raise self.error(key, f"is {value!r}, not a whole number up to {limit}")
        return int(value)

    def child(self, key: str) -> _Fields:
        value = self.raw.get(key)
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r:.80}, not an object")
        return _Fields(self.path, value, f"{self.prefix}{key}.")

    def refuse(self, key: str, harmless: tuple = (None, False)) -> None:
        value = self.raw.get(key)
        if value not in harmless:
            raise self.error(key, f"is {value!r:.80}, which jsfdd does not compute")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory. Errors as in `read_json`."""
    check_no_pointer(path)
    if not path.is_file():
        refuse_adapter(path.parent)
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} a Hugging Face model directory?")
    return read_json(path, dict, remedy="download or write it again")


def refuse_adapter(directory: Path) -> None:
    """FileNotFoundError if a directory without a model holds an adapter."""
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        raise FileNotFoundError(
            f"{adapter}: an adapter (LoRA) and not a model; merge it into its base model once, where peft is installed: "
            "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW_DIR)"
        )


def is_wrapped(directory: str | Path) -> bool:
    """Whether the decoder lies inside a model of images and text, its tensors under a prefix."""
    return read_object(Path(directory) / "config.json").get("model_type") in _WRAPPERS


def quantised_block(directory: str | Path) -> tuple[int, int] | None:
    """The block of FP8 weights that shares a scale, as `fp8.block_of` has it; None of weights that are not quantised."""
    raw = read_object(Path(directory) / "config.json")
    inner = raw["text_config"] if isinstance(raw.get("text_config"), dict) else {}
    config = raw.get("quantization_config") or inner.get("quantization_config")
    return fp8.block_of(config if isinstance(config, dict) else {})


def read_config(directory: str | Path) -> DecoderConfig:
    """The decoder that a directory's config.json describes.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: malformed, or a model type, rope rule, activation, quantisation or switch that is not supported.
    """
    path = Path(directory) / "config.json"
    return _supported(_Fields(path, read_object(path)))


def _supported(fields: _Fields) -> DecoderConfig:
    _refuse_quantised(fields)
    if wrapped := _WRAPPERS.get(str(fields.raw.get("model_type"))):
        # The head belongs to the wrapper, and so does the switch that ties it.
        outer = {key: fields.raw[key] for key in ("tie_word_embeddings",) if key in fields.raw}
        if "text_config" in fields.raw or wrapped in ("gemma3_text", "mistral"):
            fields = fields.child("text_config")
            fields = fields._replace(raw={"model_type": wrapped, **fields.raw, **outer})
        else:
            fields = fields._replace(raw=fields.raw | {"model_type": wrapped})
    return parse_decoder(*fields)


def read_ends_config(directory: str | Path) -> DecoderConfig:
    """The same for a target whose layers are not computed here but elsewhere, so that they may be of any kind.

    A supported family is read as ever, and may be quantised. Of another model, a mixture of experts or the decoder of an image
    model, the sizes are read that the head, the embedding and a draft depend on. A rotation that a draft cannot have is left
    out: a draft's config has a rotation of its own.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: malformed, or a final norm, head or embedding that jsfdd does not compute.
    """
    path = Path(directory) / "config.json"
    raw = read_object(path)
    if raw.get("model_type") in (*_FAMILIES, *_WRAPPERS):
        inner = {"text_config": _unquantised(raw["text_config"])} if isinstance(raw.get("text_config"), dict) else {}
        return _supported(_Fields(path, _unquantised(raw) | inner))
    fields = _Fields(path, _text_config(path))
    model_type = fields.raw.get("model_type")
    if isinstance(model_type, str) and "gemma" in model_type:
        raise fields.error("model_type", f"is {model_type!r}: of this family jsfdd knows the head of gemma3 alone")
    if fields.raw.get("rms_norm_eps") is None:
        raise fields.error("rms_norm_eps", "is missing: jsfdd computes no other final norm than an RMSNorm")
    for key in _SCALES_OF_ENDS:
        fields.refuse(key, harmless=(None, False, 1, 1.0))
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return DecoderConfig(
        family="llama",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", limit=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", width // heads),
        max_position=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=_rope_of_draft(fields),
        tie_embeddings=bool(fields.raw.get("tie_word_embeddings")),
    )


def _unquantised(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key != "quantization_config"}


def adds_one(directory: str | Path) -> bool:
    """Whether the model's norms compute x · (1 + w)."""
    raw = read_object(Path(directory) / "config.json")
    return str(raw.get("model_type")).startswith(_ADDS_ONE)


def _text_config(path: Path) -> dict[str, Any]:
    """What transformers makes of the config of a text model, or of the text part of another."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
        raise ValueError(f"{path}: transformers does not read it ({reason:.300})") from error
    text = config.get_text_config()
    return {"tie_word_embeddings": config.to_dict().get("tie_word_embeddings"), **text.to_dict()}


def _rope_of_draft(fields: _Fields) -> Rope:
    """The target's rotation, if a draft can have it; else its base frequency alone."""
    ropes = fields.raw.get("rope_parameters")
    rope = ropes if isinstance(ropes, dict) else {}
    rope = rope.get("full_attention") if isinstance(rope.get("full_attention"), dict) else rope
    found = _Fields(fields.path, rope, f"{fields.prefix}rope_parameters.")
    kind = rope.get("rope_type")
    plain = rope.get("partial_rotary_factor") in (None, 1, 1.0) and rope.get("truncate") in (None, True)
    if plain and kind in _ROPE_KEYS and not set(rope) - _ROPE_KEYS[kind] - {"rope_type", "rope_theta", "partial_rotary_factor"}:
        return _rope(found, fields.integer("max_position_embeddings"))
    return Rope(found.number("rope_theta", 10_000.0))


def parse_decoder(path: Path, raw: dict[str, Any], prefix: str = "") -> DecoderConfig:
    """The decoder that one JSON object describes; `path` and `prefix` say where it lies, for messages.

    Raises:
      ValueError: as in `read_config`.
    """
    fields = _Fields(path, raw, prefix)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        supported = ", ".join([*_FAMILIES, *_WRAPPERS])
        raise fields.error("model_type", f"is {model_type!r:.80}; supported are {supported}")
    if model_type.endswith("_vl_text"):
        fields = _of_text_alone(fields)
    _refuse_what_is_not_computed(fields)
    for key in (*_STATED, *_STATED_OF_EXPERTS.get(model_type, ())):
        if model_type != "gemma3_text" or key in raw:
            fields.integer(key, limit=_MAX_LAYERS if key == "num_hidden_layers" else 2**31 - 1)
    try:
        return _decoder(_completed(fields))
    except ValueError as error:
        # DecoderConfig checks what must hold between fields, but does not know the file.
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def _of_text_alone(fields: _Fields) -> _Fields:
    """`fields` without what their ropes say of images: the three coordinates of a text's token are one, its position."""
    raw = dict(fields.raw)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := raw.get(key), dict):
            rope = {name: value for name, value in rope.items() if name not in _OF_IMAGES}
            raw[key] = {name: "default" if value == "mrope" else value for name, value in rope.items()}
    return fields._replace(raw=raw)


def _refuse_quantised(fields: _Fields) -> None:
    """Refuse a quantised model that `fp8` does not read, by its method alone: the configuration may list every layer."""
    config = fields.raw.get("quantization_config")
    if config in (None, {}):
        return
    if problem := fp8.refusal(config if isinstance(config, dict) else {}):
        raise fields.error("quantization_config", problem)


def _refuse_what_is_not_computed(fields: _Fields) -> None:
    model_type = fields.raw["model_type"]
    _refuse_quantised(fields)
    if model_type in ("llama", "qwen3", "qwen3_moe", "qwen3_vl_text", "gemma3_text"):
        # It would also go on o_proj. Qwen2's biases (q, k and v only) belong to its type and have no switch.
        fields.refuse("attention_bias")
    if model_type == "llama":
        fields.refuse("mlp_bias")
    if model_type == "gemma3_text":
        for key in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
            fields.refuse(key)
    if model_type == "qwen3_moe":  # which layers are mixtures: here all are
        fields.refuse("mlp_only_layers", harmless=(None, []))
        fields.refuse("decoder_sparse_step", harmless=(None, 1))
    fields.refuse("partial_rotary_factor", harmless=(None, 1, 1.0))
    for key in ("rope_scaling", "rope_parameters"):
        if fields.raw.get(key):
            rope = fields.child(key)
            two = model_type == "gemma3_text" and key == "rope_parameters"  # of full and of sliding layers
            for part in [rope.child(kind) for kind in rope.raw if rope.raw[kind]] if two else [rope]:
                _refuse_rope(part)


def _refuse_rope(rope: _Fields) -> None:
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise rope.error("rope_type", f"is {kind!r}; supported are {', '.join(_ROPE_KEYS)}")
    rope.refuse("partial_rotary_factor", harmless=(None, 1, 1.0))
    rope.refuse("truncate", harmless=(None, True))
    unknown = set(rope.raw) - _ROPE_KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise rope.error(sorted(unknown)[0], f"is not a setting of {kind} rope that jsfdd knows")


def _completed(fields: _Fields) -> _Fields:
    """`fields` as transformers reads them: one spelling, and the family's default for what a file leaves out."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig  # a second of CPU time, which GGUF files do not need

    # Null says nothing, except about a window: there it means none.
    stated = [key for key in _SHOWN if fields.raw.get(key) is not None or (key == "sliding_window" and key in fields.raw)]
    shown = {key: _spelled_anew(fields.raw[key]) for key in stated}
    try:
        config = AutoConfig.for_model(fields.raw["model_type"], **shown).to_dict()
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise ValueError(f"{fields.path}: transformers does not read it ({reason:.300}); correct the field") from error
    return fields._replace(raw=config)


def _spelled_anew(value: Any) -> Any:
    """A copy in which a rope has a rope_type, as older files call type: transformers overlooks that in Gemma's two ropes."""
    if not isinstance(value, dict):
        return value
    return {"rope_type" if key == "type" else key: _spelled_anew(item) for key, item in value.items()}


def _decoder(fields: _Fields) -> DecoderConfig:
    model_type = fields.raw["model_type"]
    family, gemma = _FAMILIES[model_type], model_type == "gemma3_text"
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", width // heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"is {head_dim}; rotary positions need an even one")
    window, slides = _sliding(fields)
    ropes = fields.child("rope_parameters")
    common = dict(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        max_position=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=_rope(ropes.child("full_attention") if gemma else ropes, fields.integer("max_position_embeddings")),
        tie_embeddings=fields.raw.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3"),
        activation=_activation(fields, "hidden_activation" if gemma else "hidden_act"),
        sliding_window=window,
        sliding_layers=slides,
        experts=_experts(fields),
    )
    if gemma:
        common |= dict(
            sandwich_norms=True,
            embedding_scale=width**0.5,
            query_scale=fields.number("query_pre_attn_scalar") ** -0.5,
            local_rope=_rope(ropes.child("sliding_attention"), fields.integer("max_position_embeddings")),
        )
    return DecoderConfig(**common)


def _experts(fields: _Fields) -> Experts | None:
    """The mixture of experts, if the type has one. Mixtral's are as wide as its config's MLP, and their weights sum to 1."""
    model_type = fields.raw["model_type"]
    if model_type not in ("qwen3_moe", "mixtral"):
        return None
    mixtral = model_type == "mixtral"
    return Experts(
        count=fields.integer("num_local_experts", limit=_MAX_EXPERTS),
        chosen=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("intermediate_size" if mixtral else "moe_intermediate_size"),
        normalised=mixtral or fields.raw["norm_topk_prob"],
    )


def _activation(fields: _Fields, key: str) -> str:
    name = fields.raw[key]
    if name not in _ACTIVATIONS:
        raise fields.error(key, f"is {name!r}; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _sliding(fields: _Fields) -> tuple[int | None, tuple[bool, ...]]:
    """The window and which layers slide, (None, ()) where none does."""
    model_type, layers = fields.raw["model_type"], fields.integer("num_hidden_layers")
    # transformers' Llama has no window, whatever its config.json says; its Mistral and its mixtures slide in every layer.
    if model_type == "llama" or fields.raw.get("sliding_window") is None:
        return None, ()
    everywhere = model_type in ("mistral", "mixtral", "qwen3_moe")
    types = ["sliding_attention"] * layers if everywhere else fields.raw["layer_types"]
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise fields.error("layer_types", f"has {unknown[0]!r}; supported are sliding_attention and full_attention")
    slides = tuple(kind == "sliding_attention" for kind in types)
    return (fields.integer("sliding_window"), slides) if any(slides) else (None, ())


def _rope(fields: _Fields, max_position: int) -> Rope:
    """One rotation, whose kind and settings `_refuse_rope` accepted."""
    kind, theta = fields.raw["rope_type"], fields.number("rope_theta")
    if kind == "default":
        return Rope(theta)
    factor = fields.number("factor")
    if kind == "linear":
        return Rope(theta, "linear", factor)
    original = fields.integer("original_max_position_embeddings", max_position)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return Rope(theta, "llama3", factor, low, high, original_max_position=original)
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_position=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=fields.number("attention_factor", _yarn_attention_factor(fields, factor)),
    )


def _yarn_attention_factor(fields: _Fields, factor: float) -> float:
    """YaRN's factor on cos and sin: 0.1·ln(factor) + 1 (arXiv 2309.00071, §3.4), or a ratio of two such by mscale."""
    log = 0.1 * math.log(max(factor, 1.0))
    if fields.raw.get("mscale") and fields.raw.get("mscale_all_dim"):
        return (fields.number("mscale") * log + 1.0) / (fields.number("mscale_all_dim") * log + 1.0)
    return log + 1.0
