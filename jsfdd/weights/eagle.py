"""Exported drafts of EAGLE-1, 2 and 3, read from their directories, whoever wrote them (names: `weights/draft_tensors.py`).

Strict: what would change the draft and what jsfdd does not compute is an error that names it, and so are files of which one
says EAGLE-3 and another EAGLE-1/2. `weights/export.py` writes these directories, with what each engine wants of config.json.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import Draft, DraftConfig, DraftKind
from jsfdd.weights.draft_tensors import FLAT, MIDLAYER, NESTED, STACKED, Layout, tensor_names, tensor_shapes
from jsfdd.weights.draft_vocabulary import read_vocabulary_file, read_vocabulary_tensors
from jsfdd.weights.eagle3_settings import draft_kind, eagle3_settings
from jsfdd.weights.huggingface import weight_sources
from jsfdd.weights.huggingface_config import parse_decoder, read_object
from jsfdd.weights.layout import Source, insert_leaf

# Other projects save copies of tensors of the target; jsfdd always uses the target's own.
_BORROWED = ("embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight")
_PICKLED = ("*.bin", "*.pt", "*.pth")
_NAMES = {"eagle": "EAGLE-1/2", "eagle3": "EAGLE-3"}


def read_draft(directory: str | Path, num_layers: int | None = None) -> Draft:
    """Read a draft in any layout, from jsfdd or another project; arrays keep their dtype.

    Args:
      num_layers: the target's, for an EAGLE-3 draft whose files do not say which of them it reads.

    Raises:
      FileNotFoundError: config.json or the weights are missing, or only pickled weights are there.
      ValueError: a tensor is missing, unknown or misshapen, a setting is not supported, the draft's tokens are named twice or
        are not the target's, or the files are of two kinds of draft; the message names it.
    """
    directory = Path(directory)
    path = directory / "config.json"
    raw = read_object(path)
    if not isinstance(raw.get("architectures") or [], list):
        raise ValueError(f"{path}: architectures is {raw['architectures']!r:.80}, not a list; download or write it again")
    kind, nested = draft_kind(raw), "speculators_model_type" in raw
    _refuse_pickled(directory, _NAMES[kind])
    decoder = _decoder(path, raw, kind)
    sources = weight_sources(directory)
    for name in _BORROWED:
        sources.pop(name, None)
    _check_kind(path, kind, sources)
    if kind == "eagle":
        layout = NESTED if nested else FLAT
        fields, order = {"vocabulary": read_vocabulary_file(directory, decoder.vocab_size)}, None
    else:
        layout = MIDLAYER if any(name.startswith("midlayer.") for name in sources) else STACKED
        settings = eagle3_settings(path, raw, num_layers)
        size = raw.get("draft_vocab_size")
        vocabulary, order = read_vocabulary_tensors(path, size, decoder.vocab_size, sources)
        fields = {"kind": kind, "vocabulary": vocabulary, **settings}
    try:
        config = DraftConfig(decoder, fc_bias=_has_bias(path, raw, layout, sources), **fields)
    except ValueError as error:  # it checks what must hold between fields, but does not know the file
        raise ValueError(f"{path}: {error}") from error
    names = tensor_names(config, layout)
    _check(directory, kind, names, tensor_shapes(config), sources)
    params: dict = {}
    for leaf, name in names.items():
        value = sources[name].whole()
        if leaf == "head/rows" and order is not None:
            value = value[order]
        # Not jnp.asarray, which compiles a program for every shape.
        insert_leaf(params, leaf, jax.device_put(value.T if leaf.endswith("/kernel") else value))
    return Draft(config, params)


def is_exported(directory: str | Path) -> bool:
    """Whether a directory looks like a draft for some engine (as opposed to a training run's checkpoints)."""
    directory = Path(directory)
    weights = [file for pattern in ("*.safetensors", *_PICKLED) for file in directory.glob(pattern)]
    return (directory / "config.json").is_file() and bool(weights)


def _decoder(path: Path, raw: dict[str, Any], kind: DraftKind) -> DecoderConfig:
    """The draft's layer as its config.json describes it."""
    prefix = ""
    if "speculators_model_type" in raw:
        if raw["speculators_model_type"] != kind:
            raise ValueError(f"{path}: speculators_model_type is {raw['speculators_model_type']!r}; eagle and eagle3 are read")
        if raw.get("layernorms"):
            raise ValueError(f"{path}: layernorms is true: a draft with norms of its own, which jsfdd does not compute")
        raw, prefix = raw.get("transformer_layer_config"), "transformer_layer_config."
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: transformer_layer_config is {raw!r}, not an object")
    decoder = parse_decoder(path, raw, prefix)
    if decoder.family != "llama":
        raise ValueError(f"{path}: {prefix}model_type is {raw['model_type']!r}; only drafts of a llama layer are read")
    if decoder.num_layers != 1:
        raise ValueError(f"{path}: {prefix}num_hidden_layers is {decoder.num_layers}; only drafts of one layer are read")
    if "sliding_attention" in (raw.get("layer_types") or []):  # which transformers' Llama would overlook
        raise ValueError(f"{path}: {prefix}layer_types has sliding_attention; only drafts that attend to everything are read")
    # EAGLE's switch for drafts of Qwen2. A tied head says nothing about a draft: its own head is a tensor.
    return dataclasses.replace(decoder, qkv_bias=raw.get("qkv_bias") is True, tie_embeddings=False)


def _check_kind(path: Path, kind: DraftKind, sources: Mapping[str, Source]) -> None:
    """An EAGLE-3 layer norms the hidden state; no part of an EAGLE-1/2 draft does."""
    marks = sorted(name for name in sources if name.endswith(".hidden_norm.weight"))
    stored = "eagle3" if marks else "eagle"
    if stored != kind:
        mark = f"tensor {marks[0]}" if marks else "no tensor …hidden_norm.weight"
        remedy = 'add "draft_vocab_size" to it, or download both again' if marks else "download both again"
        raise ValueError(
            f"{path}: describes an {_NAMES[kind]} draft, and the weights are of {_NAMES[stored]} ({mark}); {remedy}"
        )


def _has_bias(path: Path, raw: dict[str, Any], layout: Layout, sources: dict[str, Source]) -> bool:
    """Whether fc has a bias that matters. A bias that does not is dropped from `sources`."""
    name = layout.fc + ".bias"
    if layout != NESTED and name in sources and _is_padding(sources[name], raw):
        del sources[name]
    has_bias = name in sources
    if layout == NESTED and has_bias != bool(raw.get("fusion_bias", False)):
        raise ValueError(f"{path}: fusion_bias is {raw.get('fusion_bias', False)}, but the weights say {has_bias}")
    return has_bias


def _is_padding(bias: Source, raw: dict[str, Any]) -> bool:
    """Whether fc's bias is only there because SGLang needs one: it is all zero, and config.json asks for none.

    EAGLE's own switch ("bias") is often left out or wrong, so a bias that is not zero counts whatever the switch says.
    """
    return raw.get("bias") is not True and len(bias.shape) == 1 and not np.any(bias.whole())


def _check(
    directory: Path,
    kind: DraftKind,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Source],
) -> None:
    for name in sorted(set(sources) - set(names.values())):
        raise ValueError(
            f"{sources[name].file}: unknown tensor {name}; an {_NAMES[kind]} draft of these settings has "
            f"{', '.join(names.values())}, and leaving one out would change the draft"
        )
    for leaf, name in names.items():
        if name not in sources:
            raise ValueError(f"{directory}: tensor {name} {list(shapes[leaf])} is missing; is this an {_NAMES[kind]} draft?")
        if sources[name].shape != shapes[leaf]:
            raise ValueError(
                f"{sources[name].file}: tensor {name} has shape {list(sources[name].shape)}, "
                f"the config says {list(shapes[leaf])}"
            )


def _refuse_pickled(directory: Path, name: str) -> None:
    """Say how to convert a draft of which only a pickle exists: opening one can run code, so it is never read."""
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
        f"{directory}: an {name} draft with only pickled weights ({pickled[0].name}), which can run code when opened "
        f"and are never read. Convert them once, where torch is installed: python -c {shlex.quote(convert)}"
    )
