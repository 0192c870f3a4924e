"""The tensors of a decoder, and how the params tree is filled from them: strictly, and one leaf at a time.

Both file formats pass a name per leaf and a source per tensor. Missing, unknown and misshapen tensors are errors before any
memory is allocated, so a false header costs nothing.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jsfdd.base.mesh import make_mesh, place
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.sharding import param_sharding

_BLOCK = 64  # columns stored at once by _store_transposed
_PIECE = 1 << 20  # numbers that a thread reads, converts and stores at once
_THREADS = min(16, os.cpu_count() or 1)

Index = tuple[slice, ...]


class Source(NamedTuple):
    """A tensor in a weight file: its shape and kind are known from the header, its data, or a block of it, is read on demand.

    `kind` is the name that safetensors files give its dtype.
    """

    file: Path
    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]
    kind: str = ""

    def whole(self) -> np.ndarray:
        """Read the whole tensor."""
        return self.read(tuple(slice(0, size) for size in self.shape))


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every leaf of the params tree, as "layers/mlp/up_proj/kernel", with its shape in files (matrices are [out, in]).

    A leaf stands for as many tensors as `_stacking` says. The head is a leaf only where it is not the embedding.
    """
    width = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed/embedding": (config.vocab_size, width),
        "norm/scale": (width,),
        "layers/input_norm/scale": (width,),
        "layers/mlp_norm/scale": (width,),
        "layers/attention/q_proj/kernel": (queries, width),
        "layers/attention/k_proj/kernel": (keys, width),
        "layers/attention/v_proj/kernel": (keys, width),
        "layers/attention/o_proj/kernel": (width, queries),
    }
    parts, ffn = ("proj", config.intermediate_size) if config.experts is None else ("experts", config.experts.intermediate_size)
    for name in ("gate", "up"):
        shapes[f"layers/mlp/{name}_{parts}/kernel"] = (ffn, width)
    shapes[f"layers/mlp/down_{parts}/kernel"] = (width, ffn)
    if config.experts:
        shapes["layers/mlp/router/kernel"] = (config.experts.count, width)
    if config.qkv_bias:
        shapes["layers/attention/q_proj/bias"] = (queries,)
        shapes["layers/attention/k_proj/bias"] = (keys,)
        shapes["layers/attention/v_proj/bias"] = (keys,)
    if config.qk_norm:
        shapes["layers/attention/q_norm/scale"] = (config.head_dim,)
        shapes["layers/attention/k_norm/scale"] = (config.head_dim,)
    if config.sandwich_norms:
        shapes["layers/post_attention_norm/scale"] = (width,)
        shapes["layers/post_mlp_norm/scale"] = (width,)
    if not config.tie_embeddings:
        shapes["head/kernel"] = (config.vocab_size, width)
    return shapes


def fill_params(
    config: DecoderConfig,
    names: Mapping[str, str],
    sources: Mapping[str, Source],
    dtype,
    where: Path,
    transforms: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    mesh: Mesh | None = None,
    layers: bool = True,
) -> dict:
    """The params tree of `config` (layout: `models/target.py`), layers stacked on a leading axis L, experts on a second.

    Each device of `mesh` is given its share (`models/sharding.py`), and of the files only that share is read. Host
    memory peaks at what its devices keep there (on a CPU: all of it) plus one device's share of one leaf and a few
    megabytes a thread: a share is allocated, filled piece by piece and handed over before the next; the largest leaves
    come first, when there is most room. Norm scales stay float32 whatever `dtype`: they are tiny, the norm computes in
    float32, and Gemma's 1 + w would lose bits in bfloat16.

    Args:
      names: leaf (see `stored_shapes`) -> tensor name, with "{}" for the layer's number, and a second for the expert's.
      sources: tensor name -> source, for every tensor found that is not known to be ignorable.
      dtype: of all leaves but norm scales.
      where: the file or directory, for messages.
      transforms: leaf -> function from the stored tensor to the one that is kept, of the same shape. It sees whole tensors.
      mesh: from `make_mesh`; the first device alone unless given.
      layers: also the layers; without them the tree has the embedding, the final norm and the head.

    Raises:
      ValueError: a tensor is missing, unknown or misshapen, or cannot be split over the mesh; the message names it.
    """
    mesh = mesh or make_mesh(data=1)
    shapes = {leaf: shape for leaf, shape in stored_shapes(config).items() if layers or not leaf.startswith("layers/")}
    stacking = {leaf: _stacking(leaf, config) for leaf in shapes}
    tensors = {leaf: [names[leaf].format(*place) for place in np.ndindex(*stacking[leaf])] for leaf in shapes}
    _check(shapes, tensors, sources, where)
    kept = {leaf: (*stacking[leaf], *_kept_shape(leaf, shape)) for leaf, shape in shapes.items()}
    shardings = {leaf: param_sharding(leaf, kept[leaf], mesh) for leaf in shapes}  # before any memory is taken
    params: dict = {}
    for leaf in sorted(shapes, key=lambda leaf: -math.prod(kept[leaf])):
        transform = (transforms or {}).get(leaf)
        kind = np.float32 if leaf.endswith("/scale") else dtype
        stacked = [sources[name] for name in tensors[leaf]]
        build = functools.partial(_block, leaf, stacked, stacking[leaf], transform, kind)
        insert_leaf(params, leaf, place(kept[leaf], shardings[leaf], build))
    return params


def _stacking(leaf: str, config: DecoderConfig) -> tuple[int, ...]:
    """The axes along which a leaf stacks tensors: layers and experts, layers, or none."""
    if not leaf.startswith("layers/"):
        return ()
    return (config.num_layers, config.experts.count) if leaf.endswith("_experts/kernel") else (config.num_layers,)


def _kept_shape(leaf: str, stored: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a leaf keeps one tensor: kernels are [in, out]."""
    return stored[::-1] if leaf.endswith("/kernel") else stored


def _block(
    leaf: str, sources: Sequence[Source], stacking: tuple[int, ...], transform: Callable | None, dtype, index: Index
) -> np.ndarray:
    """The part of a leaf at `index`, its layers among it; read, converted and stored in pieces by several threads."""
    is_kernel, part = leaf.endswith("/kernel"), index[len(stacking) :]
    chosen = np.ravel(np.arange(len(sources)).reshape(stacking)[index[: len(stacking)]])
    filled = _aligned(tuple(s.stop - s.start for s in index), dtype)
    rows_of = filled.reshape(len(chosen), *filled.shape[len(stacking) :])
    stored = part[::-1] if is_kernel else part

    def fill(job):
        row, source, rows = job
        region = (rows, *stored[1:])
        tensor = transform(source.whole())[region] if transform else source.read(region)
        place = slice(rows.start - stored[0].start, rows.stop - stored[0].start)
        if is_kernel:
            _store_transposed(row[:, place], tensor)
        else:
            row[place] = tensor

    pieces = [stored[0]] if transform else _pieces(stored)
    jobs = [(row, sources[number], rows) for row, number in zip(rows_of, chosen, strict=True) for rows in pieces]
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(fill, jobs):  # the first error is raised here
            pass
    return filled


def _pieces(stored: Index) -> list[slice]:
    """`stored[0]` cut so that a piece has some `_PIECE` numbers, and rows enough for `_store_transposed`."""
    first, width = stored[0], math.prod(s.stop - s.start for s in stored[1:])
    rows = max(_BLOCK, _PIECE // max(width, 1))
    return [slice(start, min(start + rows, first.stop)) for start in range(first.start, first.stop, rows)]


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An empty array that begins at a multiple of 64 bytes: a CPU device takes it without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)


def _check(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Iterable[str]],
    sources: Mapping[str, Source],
    where: Path,
) -> None:
    known = set()
    for leaf, shape in shapes.items():
        for name in tensors[leaf]:
            if name not in sources:
                raise ValueError(f"{where}: tensor {name} {list(shape)} is missing; the config promises it")
            source = sources[name]
            if tuple(source.shape) != shape:
                raise ValueError(f"{source.file}: tensor {name} has shape {list(source.shape)}, the config says {list(shape)}")
            known.add(name)
    for name, source in sources.items():
        if name not in known:
            raise ValueError(
                f"{source.file}: unknown tensor {name} {list(source.shape)}: the architecture that the config "
                "describes has no place for it, and leaving it out would change the model"
            )


def _store_transposed(target: np.ndarray, tensor: np.ndarray) -> None:
    """`tensor.T` into `target`, so many columns at a time that it misses the cache four times less often."""
    for start in range(0, len(tensor), _BLOCK):
        target[:, start : start + _BLOCK] = tensor[start : start + _BLOCK].T


def insert_leaf(tree: dict, leaf: str, value: jax.Array) -> None:
    """Put `value` into a nested dict under the path `leaf`, as "layer/mlp/up_proj/kernel"."""
    *branches, last = leaf.split("/")
    for branch in branches:
        tree = tree.setdefault(branch, {})
    tree[last] = value
