"""EAGLE-1/2 drafts as files: which tensors there are under which names, and reading them, whoever wrote them.

Two layouts hold the same tensors, all as torch's Linear stores them ([out, in]):

    flat (EAGLE, vLLM, SGLang)              nested (speculators)
    fc.weight [D, 2D], fc.bias [D]          fusion_fc.weight, fusion_fc.bias
    layers.0.self_attn.*, layers.0.mlp.*    transformer.self_attn.*, transformer.mlp.*
    layers.0.post_attention_layernorm       transformer.post_attention_layernorm

fc reads (embedding, hidden). There is no input norm, final norm, embedding or head: the first two do not exist, the others
are the target's. `weights/export.py` writes these directories, with what each engine wants of config.json.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import Draft, DraftConfig
from jsfdd.weights.huggingface import weight_sources
from jsfdd.weights.huggingface_config import parse_decoder, read_object
from jsfdd.weights.layout import Source, insert_leaf, stored_shapes


class Layout(NamedTuple):
    """The names that a layout gives to the fusing map and to the decoder layer."""

    fc: str
    layer: str


FLAT = Layout("fc", "layers.0")
NESTED = Layout("fusion_fc", "transformer")

# The decoder layer's modules in the params tree and in files.
_MODULES = {
    "attention/q_proj": "self_attn.q_proj",
    "attention/k_proj": "self_attn.k_proj",
    "attention/v_proj": "self_attn.v_proj",
    "attention/o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate_proj": "mlp.gate_proj",
    "mlp/up_proj": "mlp.up_proj",
    "mlp/down_proj": "mlp.down_proj",
}
_KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Peers save a copy of the target's embedding with the draft; here it is always the target's own.
_BORROWED = "embed_tokens.weight"
_PICKLED = ("*.bin", "*.pt", "*.pth")


def tensor_names(config: DraftConfig, layout: Layout) -> dict[str, str]:
    """Leaf of the params tree ("layer/mlp/up_proj/kernel") -> name of its tensor, for every leaf that the draft has."""
    return {leaf: _tensor_name(leaf, layout) for leaf in tensor_shapes(config)}


def tensor_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Leaf -> its shape in files, where matrices are [out, in]."""
    width = config.decoder.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"fc/kernel": (width, 2 * width)}
    if config.fc_bias:
        shapes["fc/bias"] = (width,)
    for leaf, shape in stored_shapes(config.decoder).items():
        if leaf.startswith("layers/") and leaf != "layers/input_norm/scale":
            shapes["layer/" + leaf.removeprefix("layers/")] = shape
    return shapes


def draft_tensors(config: DraftConfig, params: dict, layout: Layout) -> dict[str, np.ndarray]:
    """The tensors of a draft by name, as files store them, in the dtype that they have."""
    tensors = {}
    for leaf, name in tensor_names(config, layout).items():
        value = params
        for key in leaf.split("/"):
            value = value[key]
        tensors[name] = np.ascontiguousarray(np.asarray(value).T if leaf.endswith("/kernel") else value)
    return tensors


def read_draft(directory: str | Path) -> Draft:
    """A draft from either layout, written here or by a peer; arrays keep their dtype.

    Raises:
      FileNotFoundError: config.json or the weights are missing, or only pickled weights are there.
      ValueError: a tensor is missing, unknown or misshapen, or a setting is not supported; the message names it.
    """
    directory = Path(directory)
    path = directory / "config.json"
    raw = read_object(path)
    _refuse_eagle3(path, raw)
    _refuse_pickled(directory)
    layout = NESTED if "speculators_model_type" in raw else FLAT
    decoder = _decoder(path, raw, layout)
    found = weight_sources(directory)
    found.pop(_BORROWED, None)
    bias = layout.fc + ".bias"
    if layout == FLAT and bias in found and _is_padding(found[bias], raw):
        del found[bias]
    has_bias = bias in found
    if layout == NESTED and has_bias != bool(raw.get("fusion_bias", False)):
        raise ValueError(f"{path}: fusion_bias is {raw.get('fusion_bias', False)}, but the weights say {has_bias}")
    config = DraftConfig(decoder, fc_bias=has_bias)
    names = tensor_names(config, layout)
    _check(directory, names, tensor_shapes(config), found)
    params: dict = {}
    for leaf, name in names.items():
        value = found[name].whole()
        insert_leaf(params, leaf, jnp.asarray(value.T if leaf.endswith("/kernel") else value))
    return Draft(config, params)


def is_exported(directory: str | Path) -> bool:
    """Whether a directory looks like a draft for some engine (as opposed to a training run's checkpoints)."""
    directory = Path(directory)
    weights = [file for pattern in ("*.safetensors", *_PICKLED) for file in directory.glob(pattern)]
    return (directory / "config.json").is_file() and bool(weights)


def _tensor_name(leaf: str, layout: Layout) -> str:
    module, kind = leaf.rsplit("/", 1)
    name = layout.fc if module == "fc" else f"{layout.layer}.{_MODULES[module.removeprefix('layer/')]}"
    return f"{name}.{_KINDS[kind]}"


def _decoder(path: Path, raw: dict[str, Any], layout: Layout) -> DecoderConfig:
    """The draft's layer as its config.json describes it."""
    prefix = ""
    if layout == NESTED:
        if raw["speculators_model_type"] != "eagle":
            raise ValueError(f"{path}: speculators_model_type is {raw['speculators_model_type']!r}; only eagle is read here")
        if raw.get("layernorms"):
            raise ValueError(f"{path}: layernorms is true: a draft with norms of its own, which jsfdd does not compute")
        raw, prefix = raw.get("transformer_layer_config"), "transformer_layer_config."
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: transformer_layer_config is {raw!r}, not an object")
    decoder = parse_decoder(path, raw, prefix)
    if decoder.family != "llama":
        raise ValueError(f"{path}: {prefix}model_type is {raw['model_type']!r}; an EAGLE-1/2 draft is a llama layer")
    if decoder.num_layers != 1:
        raise ValueError(f"{path}: {prefix}num_hidden_layers is {decoder.num_layers}; an EAGLE-1/2 draft has one layer")
    # EAGLE's switch for drafts of Qwen2. Ties say nothing about a draft: it has neither embedding nor head.
    return dataclasses.replace(decoder, qkv_bias=raw.get("qkv_bias") is True, tie_embeddings=False)


def _is_padding(bias: Source, raw: dict[str, Any]) -> bool:
    """Whether fc's bias is only there because SGLang cannot do without it: all zero, and not asked for.

    EAGLE's own switch ("bias") is often left out or wrong, so a bias that says something counts whatever the switch says.
    """
    return raw.get("bias") is not True and len(bias.shape) == 1 and not np.any(bias.whole())


def _check(
    directory: Path, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Source]
) -> None:
    for name in sorted(set(found) - set(names.values())):
        raise ValueError(
            f"{found[name].file}: unknown tensor {name}; an EAGLE-1/2 draft has {', '.join(names.values())}, and leaving "
            "one out would change the draft"
        )
    for leaf, name in names.items():
        if name not in found:
            raise ValueError(f"{directory}: tensor {name} {list(shapes[leaf])} is missing; is this an EAGLE-1/2 draft?")
        if found[name].shape != shapes[leaf]:
            raise ValueError(
                f"{found[name].file}: tensor {name} has shape {list(found[name].shape)}, the config says {list(shapes[leaf])}"
            )


def _refuse_eagle3(path: Path, raw: dict[str, Any]) -> None:
    """EAGLE-3 drafts have other inputs and a vocabulary of their own; their files say so in several ways."""
    named = [raw.get("speculators_model_type"), *(raw.get("architectures") or [])]
    kinds = [str(name) for name in named if name and "eagle3" in str(name).lower().replace("-", "").replace("_", "")]
    if kinds or "draft_vocab_size" in raw:
        what = kinds[0] if kinds else "draft_vocab_size"
        raise ValueError(f"{path}: {what} is of an EAGLE-3 draft; drafts of EAGLE-1 and EAGLE-2 are read")


def _refuse_pickled(directory: Path) -> None:
    """Say how to convert a draft that is there as a pickle only, which can run code when opened and is never read."""
    pickled = sorted(file for pattern in _PICKLED for file in directory.glob(pattern))
    if not pickled or any(directory.glob("*.safetensors")):
        return
    # A line for the user to run elsewhere, and never run here.
    convert = (
        "import torch, safetensors.torch as s; "
        f't = torch.load({json.dumps(str(pickled[0]))}, map_location="cpu", weights_only=True); '
        f"s.save_file({{k: v.contiguous() for k, v in t.items()}}, {json.dumps(str(directory / 'model.safetensors'))})"
    )
    raise FileNotFoundError(
        f"{directory}: only pickled weights ({pickled[0].name}), which can run code when opened and are never read. "
        f"Convert them once, where torch is installed: python -c {shlex.quote(convert)}"
    )
