"""Dequantise FP8 checkpoints as they are read: a tensor of F8_E4M3 numbers, times its scales, which lie beside it.

    W[o, i] = weight[o, i] · scale[o // b, i // c]

Qwen and DeepSeek write X.weight_scale_inv, one number a block of [b, c]; compressed-tensors writes X.weight_scale, one a block,
a row or a tensor. Both multiply, whatever the first one's name says. What rounds activations (X.input_scale) is left out: they
are not rounded here.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from jsfdd.weights.layout import Index, Source

KIND = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale")
_SAVED_WHOLE = (
    "give the original model, or write a dequantised one "
    "(AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(NEW_DIR))"
)
_NO_BLOCK = (0, 0)  # fits no scales
_NO_WAY_BACK = "give the model that it was made from, or its FP8 version"


def refusal(config: dict) -> str | None:
    """Why a checkpoint with this quantization_config is not read; None if it is."""
    method = str(config.get("quant_method") or "an unnamed method")
    is_fp8 = method == "fp8" and config.get("fmt", "e4m3") == "e4m3"
    if is_fp8 or (method == "compressed-tensors" and _are_floats(config)):
        if block_of(config) != _NO_BLOCK:
            return None
        return (
            "has a weight_block_size or block_structure that is not two positive whole numbers; take config.json from its model"
        )
    details = [str(config[key]) for key in ("fmt", "format", "bnb_4bit_quant_type") if isinstance(config.get(key), str)]
    details += [f"{config['bits']} bits"] if isinstance(config.get("bits"), int) else []
    kind = f"{method} ({', '.join(details)})" if details else method
    remedy = _NO_WAY_BACK if method in ("awq", "gptq") else _SAVED_WHOLE
    return f"says that the weights are quantised with {kind:.80}, which jsfdd does not read; {remedy}"


def _are_floats(config: dict) -> bool:
    """Whether all that compressed-tensors quantised are weights of eight-bit floats."""
    wanted = {"num_bits": 8, "type": "float", "symmetric": True}
    groups = _weights(config)
    return bool(groups) and all(weights.get(key) == value for weights in groups for key, value in wanted.items())


def _weights(config: dict) -> list[dict]:
    """How each group of compressed-tensors' config says that weights are quantised; {} where it says nothing."""
    groups = config.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    entries = [group.get("weights") for group in groups if isinstance(group, dict)]
    return [weights if isinstance(weights, dict) else {} for weights in entries]


def block_of(config: dict) -> tuple[int, int] | None:
    """The block [b, c] of weights that shares a scale; None where rows or whole tensors do."""
    blocks = [config.get("weight_block_size"), *(weights.get("block_structure") for weights in _weights(config))]
    block = next((block for block in blocks if block), None)
    if block is None:
        return None
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return tuple(block)
    return _NO_BLOCK


def dequantised(sources: dict[str, Source], block: tuple[int, int] | None) -> dict[str, Source]:
    """`sources` with every FP8 tensor and its scales in one float32 source; all others as they are.

    Raises:
      ValueError: an FP8 tensor has no scales, or scales of another shape than its own and `block` ask for.
    """
    result = dict(sources)
    for name, weight in sources.items():
        if weight.kind != KIND:
            continue
        scale = next((result.pop(name + ending) for ending in _SCALES if name + ending in result), None)
        if scale is None:
            raise ValueError(
                f"{weight.file}: tensor {name} has type {KIND} and no {name}{_SCALES[0]} or {_SCALES[1]} beside it"
            )
        shared = _shared(name, weight, scale, block)
        stored = weight._replace(read=functools.partial(_read_raw, weight.file, name))
        result[name] = weight._replace(kind="F32", read=functools.partial(_read_scaled, stored, scale, shared))
        for ending in _OF_ACTIVATIONS:
            result.pop(f"{name.removesuffix('weight')}{ending}", None)
    return result


def _shared(name: str, weight: Source, scale: Source, block: tuple[int, int] | None) -> tuple[int, int]:
    """The rows and columns of a weight that share a scale."""
    if math.prod(scale.shape) == 1:
        return weight.shape
    shared = block or (1, weight.shape[-1])
    expected = tuple(-(-size // part) for size, part in zip(weight.shape, shared)) if min(shared) > 0 else ()
    if len(weight.shape) != 2 or scale.shape != expected:
        raise ValueError(
            f"{scale.file}: the scales of {name} {list(weight.shape)} have shape {list(scale.shape)}; one for each block of "
            f"{list(shared)} would be {list(expected)}"
        )
    return shared


def _read_scaled(weight: Source, scale: Source, shared: tuple[int, int], index: Index) -> np.ndarray:
    scales = scale.whole().astype(np.float32).reshape([-(-size // part) for size, part in zip(weight.shape, shared)])
    places = [np.arange(s.start, s.stop) // part for s, part in zip(index, shared)]
    return weight.read(index).astype(np.float32) * scales[np.ix_(*places)]


def _read_raw(file: Path, name: str, index: Index) -> np.ndarray:
    """A part of an FP8 tensor of a safetensors file, which NumPy has no type for and the safetensors package does not read."""
    shape, offset = _places(file, file.stat().st_mtime_ns)[name]
    return np.array(np.memmap(file, np.uint8, "r", offset, shape)[index]).view(ml_dtypes.float8_e4m3fn)


@functools.lru_cache(maxsize=4)  # one header may list thousands of experts' tensors, each read in pieces
def _places(file: Path, modified: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """The shape of every tensor of a file that safetensors could open, and the byte at which it begins."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {name: (tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]) for name, entry in header.items()}
