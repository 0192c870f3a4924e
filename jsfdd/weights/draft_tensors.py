"""A draft's tensors as files hold them: their names in every layout, and their shapes, as torch's Linear has them ([out, in]).

                   FLAT (EAGLE-1/2)       NESTED (speculators' EAGLE-1)   MIDLAYER (EAGLE-3)     STACKED (speculators' EAGLE-3)
    fc             fc [D, 2D]             fusion_fc                       fc [D, nD]             fc
    the layer      layers.0.self_attn.*   transformer.self_attn.*         midlayer.self_attn.*   layers.0.self_attn.*
    its norms      post_attention_…       post_attention_…                input_…, hidden_norm, post_attention_…
    final norm     the target's           the target's                    norm                   norm
    head           the target's           the target's                    lm_head [Vq, D]        lm_head
    over streams                                                          input_norm, fc_norm.i  the same

An EAGLE-1/2 draft's fc reads (embedding, hidden), an EAGLE-3 draft's the streams in the order of the target's layers. The
embedding is the target's in all. Which tokens a draft can propose stands in `weights/draft_vocabulary.py`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np

from jsfdd.models.draft import DraftConfig, init_draft


class Layout(NamedTuple):
    """The names that a layout gives to the fusing map and to the decoder layer."""

    fc: str
    layer: str


FLAT = Layout("fc", "layers.0")
NESTED = Layout("fusion_fc", "transformer")
MIDLAYER = Layout("fc", "midlayer")
STACKED = Layout("fc", "layers.0")

# Modules of the params tree that have other names in files. The layer's modules stand under the layer's name.
_LAYER_MODULES = {
    "embedding_norm": "input_layernorm",
    "hidden_norm": "hidden_norm",
    "attention/q_proj": "self_attn.q_proj",
    "attention/k_proj": "self_attn.k_proj",
    "attention/v_proj": "self_attn.v_proj",
    "attention/o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate_proj": "mlp.gate_proj",
    "mlp/up_proj": "mlp.up_proj",
    "mlp/down_proj": "mlp.down_proj",
}
_OTHER_MODULES = {"head": "lm_head", "norm": "norm", "input_norm": "input_norm"}
_PER_STREAM = "fc_norm_"
_KINDS = {"kernel": "weight", "scale": "weight", "rows": "weight", "bias": "bias"}


def tensor_names(config: DraftConfig, layout: Layout) -> dict[str, str]:
    """Leaf of the params tree ("layer/mlp/up_proj/kernel") -> name of its tensor, for every leaf that the draft has."""
    return {leaf: _tensor_name(leaf, layout) for leaf in tensor_shapes(config)}


@functools.lru_cache(maxsize=8)
def tensor_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Leaf -> its shape in files."""
    params = jax.eval_shape(lambda: init_draft(config, jax.random.key(0)))
    leaves = {"/".join(key.key for key in path): x.shape for path, x in jax.tree.leaves_with_path(params)}
    return {leaf: shape[::-1] if leaf.endswith("/kernel") else shape for leaf, shape in leaves.items()}


def draft_tensors(config: DraftConfig, params: dict, layout: Layout) -> dict[str, np.ndarray]:
    """The tensors of a draft's parameters by name, as files store them, in the dtype that they have."""
    tensors = {}
    for leaf, name in tensor_names(config, layout).items():
        value = params
        for key in leaf.split("/"):
            value = value[key]
        tensors[name] = np.ascontiguousarray(np.asarray(value).T if leaf.endswith("/kernel") else value)
    return tensors


def _tensor_name(leaf: str, layout: Layout) -> str:
    module, kind = leaf.rsplit("/", 1)
    if module == "fc":
        name = layout.fc
    elif module.startswith(_PER_STREAM):
        name = f"fc_norm.{module.removeprefix(_PER_STREAM)}"
    elif module.startswith("layer/"):
        name = f"{layout.layer}.{_LAYER_MODULES[module.removeprefix('layer/')]}"
    else:
        name = _OTHER_MODULES[module]
    return f"{name}.{_KINDS[kind]}"
