"""Write drafts for the engines that serve them: one directory per flavour, which the engine loads unchanged.

What each flavour can say is in `weights/flavours.py`, what its tensors are called in `weights/draft_tensors.py`; here is what
its engine reads of config.json. Everywhere "attention_bias" and "mlp_bias" are spelled out as false: to some engines a missing
or true switch means biases of their own, left as they were in memory. For the same reason an EAGLE-3 draft's four norm switches
and its rope_theta are always there, and the target's layers in both ways of numbering them (`weights/eagle3_settings.py`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jsfdd.base.disk import writing
from jsfdd.base.files import sync
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.draft import DraftConfig, DraftKind
from jsfdd.weights.card import ExportDtype, Flavour, Provenance, Serving, extended_context, model_card
from jsfdd.weights.draft_tensors import FLAT, MIDLAYER, NESTED, STACKED, draft_tensors
from jsfdd.weights.draft_vocabulary import vocabulary_tensors, write_vocabulary_file
from jsfdd.weights.eagle3_settings import LAYERS, NORM_FLAGS
from jsfdd.weights.flavours import ACTIVATIONS, check_flavour
from jsfdd.weights.huggingface_config import read_object

# The last release of speculators with EAGLE-1 drafts, and a release with EAGLE-3 drafts.
_SPECULATORS_VERSIONS = {"eagle": "0.4.0.1", "eagle3": "0.9.0"}
# The name by which each engine finds its EAGLE-3 class.
_EAGLE3_CLASSES = {"speculators": "Eagle3Speculator", "tpu-inference": "Eagle3LlamaForCausalLM"}
_EAGLE3_CLASS = "LlamaForCausalLMEagle3"
_ALWAYS_D2T = ("tpu-inference", "sglang-jax")  # their classes have the tensor whatever the vocabulary


def write_draft(
    directory: str | Path,
    config: DraftConfig,
    params: dict,
    flavour: Flavour,
    *,
    dtype: ExportDtype = "keep",
    serving: Serving = Serving(),  # noqa: B008 (immutable)
    provenance: Provenance = Provenance(),  # noqa: B008
) -> None:
    """Write config.json, model.safetensors, README.md and, for an EAGLE-1/2 draft with a small head, its tokens.

    The directory appears atomically.

    Args:
      directory: must not exist yet.
      config, params: from `init_draft` or `load_draft`.
      dtype: of every tensor; "keep" writes them as they are, which must then be one dtype.
      serving, provenance: for the model card; speculators' config.json also holds the first.

    Raises:
      FileExistsError: the directory is there already.
      ValueError: the flavour cannot represent the draft, or a value is not finite in `dtype`; the message names it.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory}: already there; choose another --out or remove it")
    check_flavour(config, flavour, serving)
    flat, nested = (FLAT, NESTED) if config.kind == "eagle" else (MIDLAYER, STACKED)
    tensors = _cast(draft_tensors(config, params, nested if flavour == "speculators" else flat), dtype)
    written = next(iter(tensors.values())).dtype
    if config.kind == "eagle" and flavour == "sglang" and not config.fc_bias:
        tensors["fc.bias"] = np.zeros(config.decoder.hidden_size, written)
    if config.kind == "eagle3" and (config.vocabulary or flavour in _ALWAYS_D2T):
        tensors |= vocabulary_tensors(config)
    settings = draft_settings(config, flavour, written.name, serving)
    card = model_card(directory.name, config, flavour, written.name, serving, provenance)

    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():  # left by an interrupted export
        shutil.rmtree(partial)
    try:
        with writing(directory, sum(tensor.nbytes for tensor in tensors.values()), also=(SafetensorError,)):
            partial.mkdir(parents=True)
            (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            (partial / "README.md").write_text(card, encoding="utf-8")
            if config.kind == "eagle":
                write_vocabulary_file(partial, config)
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            # safetensors writes files that only their owner can read, and servers often run as another user.
            (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)
            for path in (*partial.iterdir(), partial):
                sync(path)
            partial.rename(directory)
            sync(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def draft_settings(config: DraftConfig, flavour: Flavour, dtype: str, serving: Serving) -> dict:
    """config.json of a draft that `check_flavour` accepts."""
    return (_eagle_settings if config.kind == "eagle" else _eagle3_settings)(config, flavour, dtype, serving)


def _eagle_settings(config: DraftConfig, flavour: Flavour, dtype: str, serving: Serving) -> dict:
    layer = _layer_settings(config.decoder, flavour)
    if flavour == "speculators":
        return {
            "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
            **_speculators_settings("eagle", serving),
            "transformer_layer_architecture": "LlamaDecoderLayer",
            "transformer_layer_config": layer,
            "layernorms": False,
            "fusion_bias": config.fc_bias,
            "torch_dtype": dtype,
        }
    return {
        "architectures": ["LlamaForCausalLMEagle" if flavour == "sglang" else "LlamaForCausalLM"],
        **layer,
        # EAGLE means fc's bias by this; SGLang and vLLM mean the attention's.
        "bias": config.fc_bias and flavour == "eagle",
        **({"qkv_bias": True} if config.decoder.qkv_bias else {}),
        "torch_dtype": dtype,
    }


def _eagle3_settings(config: DraftConfig, flavour: Flavour, dtype: str, serving: Serving) -> dict:
    layer, layers = _layer_settings(config.decoder, flavour), list(config.target_layers)
    own_settings = {
        "draft_vocab_size": len(config.vocabulary) or config.decoder.vocab_size,
        LAYERS: layers,
        **{flag: getattr(config, flag) for flag in NORM_FLAGS},
    }
    architectures = {"architectures": [_EAGLE3_CLASSES.get(flavour, _EAGLE3_CLASS)]}
    if flavour == "speculators":
        speculators = _speculators_settings("eagle3", serving)
        return {**architectures, **speculators, "transformer_layer_config": layer, **own_settings, "torch_dtype": dtype}
    return {
        **architectures,
        **layer,
        **own_settings,
        "eagle_config": {"use_aux_hidden_state": True, LAYERS: [number - 1 for number in layers]},
        "num_aux_hidden_states": len(layers),
        "bias": False,
        "torch_dtype": dtype,
    }


def _layer_settings(d: DecoderConfig, flavour: Flavour) -> dict:
    """What transformers' Llama reads."""
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": d.hidden_size,
        "intermediate_size": d.intermediate_size,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim,
        "vocab_size": d.vocab_size,
        "max_position_embeddings": extended_context(d),
        "rms_norm_eps": d.rms_norm_eps,
        "rope_theta": d.rope.theta,
        "rope_scaling": _rope_scaling(d.rope, "type" if flavour == "eagle" else "rope_type"),
        "hidden_act": ACTIVATIONS[d.activation],
        # A draft has no embedding to tie a head to: SGLang would take the target's embedding for its head.
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _speculators_settings(algorithm: DraftKind, serving: Serving) -> dict:
    """The decoding settings for speculators, which vLLM reads from its directories, too."""
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": serving.num_draft_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "speculators_model_type": algorithm,
        "speculators_version": _SPECULATORS_VERSIONS[algorithm],
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": serving.target_name, "architectures": _architectures(serving.target_name)},
        },
    }


def _rope_scaling(rope: Rope, kind_key: str) -> dict | None:
    if rope.kind == "default":
        return None
    scaling = {kind_key: rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position
    return scaling


def _architectures(target: str) -> list[str]:
    """The target's class names, if its directory is at hand; speculators takes none for not known."""
    path = Path(target) / "config.json"
    return list(read_object(path).get("architectures") or []) if path.is_file() else []


def _cast(tensors: dict[str, np.ndarray], dtype: ExportDtype) -> dict[str, np.ndarray]:
    """Convert `tensors` to one dtype, and check that all are finite."""
    kinds = sorted({value.dtype.name for value in tensors.values()})
    if dtype == "keep" and len(kinds) > 1:
        raise ValueError(f"--export-dtype keep: the draft's tensors are {' and '.join(kinds)}; choose one of them")
    cast = {}
    for name, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"tensor {name} is not finite: the draft is broken; train it again")
        with np.errstate(over="ignore"):
            cast[name] = value if dtype == "keep" else value.astype(jnp.dtype(dtype))
        if not np.isfinite(cast[name].astype(np.float32)).all():
            raise ValueError(f"--export-dtype {dtype}: tensor {name} overflows it; choose bfloat16")
    return cast
