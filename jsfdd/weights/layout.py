"""Which tensors a decoder has, and the params tree filled from them: strict, and one leaf at a time.

Both file formats come here with a name per leaf and a source per tensor; what is missing, unknown or misshapen is found
before any memory is taken, so a lying header costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.models.architecture import DecoderConfig

_BLOCK = 64  # columns copied at once by _store: a transposed copy in blocks misses the cache 4 times less often


class Source(NamedTuple):
    """A tensor in a weight file: its shape is known from the header, its data is read on demand."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every leaf of the params tree, as "layers/mlp/up_proj/kernel", with its shape in files (matrices are [out, in]).

    A leaf under "layers/" stands for one tensor per layer. The head is a leaf only where it is not the embedding.
    """
    width, ffn = config.hidden_size, config.intermediate_size
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
        "layers/mlp/gate_proj/kernel": (ffn, width),
        "layers/mlp/up_proj/kernel": (ffn, width),
        "layers/mlp/down_proj/kernel": (width, ffn),
    }
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
) -> dict:
    """The params tree of `config` (layout: `models/target.py`), its layers stacked on a leading axis L.

    Host memory peaks at the tree plus one leaf and one tensor: a leaf is allocated whole, filled tensor by tensor and
    handed to JAX before the next. Norm scales stay float32 whatever `dtype`: they are tiny, the norm computes in
    float32, and Gemma's 1 + w would lose bits in bfloat16.

    Args:
      names: leaf (see `stored_shapes`) -> tensor name, with "{}" for the layer number.
      sources: tensor name -> source, for every tensor found that is not known to be ignorable.
      dtype: of all leaves but norm scales.
      where: the file or directory, for messages.
      transforms: leaf -> function from the stored tensor to the one that is kept, of the same shape.

    Raises:
      ValueError: a tensor is missing, unknown or misshapen; the message names it, its file and both shapes.
    """
    shapes = stored_shapes(config)
    tensors = {leaf: _tensor_names(leaf, names[leaf], config.num_layers) for leaf in shapes}
    _check(shapes, tensors, sources, where)
    params: dict = {}
    for leaf, shape in shapes.items():
        is_kernel = leaf.endswith("/kernel")
        transform = (transforms or {}).get(leaf)
        kind = np.float32 if leaf.endswith("/scale") else dtype
        filled = np.empty((len(tensors[leaf]), *(shape[::-1] if is_kernel else shape)), kind)
        for row, name in zip(filled, tensors[leaf], strict=True):
            tensor = sources[name].read()
            _store(row, transform(tensor) if transform else tensor, transposed=is_kernel)
        insert_leaf(params, leaf, jnp.asarray(filled if leaf.startswith("layers/") else filled[0]))
    return params


def _tensor_names(leaf: str, template: str, num_layers: int) -> list[str]:
    if leaf.startswith("layers/"):
        return [template.format(layer) for layer in range(num_layers)]
    return [template]


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
                raise ValueError(
                    f"{source.file}: tensor {name} has shape {list(source.shape)}, the config says {list(shape)}"
                )
            known.add(name)
    for name, source in sources.items():
        if name not in known:
            raise ValueError(
                f"{source.file}: unknown tensor {name} {list(source.shape)}: the architecture that the config "
                "describes has no place for it, and leaving it out would change the model"
            )


def _store(target: np.ndarray, tensor: np.ndarray, transposed: bool) -> None:
    if not transposed:
        target[...] = tensor
        return
    for start in range(0, len(tensor), _BLOCK):
        target[:, start : start + _BLOCK] = tensor[start : start + _BLOCK].T


def insert_leaf(tree: dict, leaf: str, value: jax.Array) -> None:
    """Put `value` into a nested dict under the path `leaf`, as "layer/mlp/up_proj/kernel"."""
    *branches, last = leaf.split("/")
    for branch in branches:
        tree = tree.setdefault(branch, {})
    tree[last] = value
