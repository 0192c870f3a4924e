"""EAGLE-1/2 drafts in the layout that EAGLE and vLLM load: config.json and model.safetensors.

Tensors, as torch's Linear stores them ([out, in]): fc.weight [D, 2D] over (embedding, hidden), layers.0.self_attn.*,
layers.0.mlp.*, layers.0.post_attention_layernorm.weight, and fc.bias only where the draft has one. No input norm, final
norm, embedding or head: the first two do not exist, the others are the target's.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jsfdd.models.architecture import Rope
from jsfdd.models.draft import DraftConfig
from jsfdd.weights.huggingface import weight_files
from jsfdd.weights.huggingface_config import read_config

_LAYER = "layers.0."
# Leaf of the draft's params -> tensor name. Kernels are transposed on the way.
_NAMES = {
    ("fc", "kernel"): "fc.weight",
    ("layer", "attention", "q_proj", "kernel"): _LAYER + "self_attn.q_proj.weight",
    ("layer", "attention", "k_proj", "kernel"): _LAYER + "self_attn.k_proj.weight",
    ("layer", "attention", "v_proj", "kernel"): _LAYER + "self_attn.v_proj.weight",
    ("layer", "attention", "o_proj", "kernel"): _LAYER + "self_attn.o_proj.weight",
    ("layer", "mlp_norm", "scale"): _LAYER + "post_attention_layernorm.weight",
    ("layer", "mlp", "gate_proj", "kernel"): _LAYER + "mlp.gate_proj.weight",
    ("layer", "mlp", "up_proj", "kernel"): _LAYER + "mlp.up_proj.weight",
    ("layer", "mlp", "down_proj", "kernel"): _LAYER + "mlp.down_proj.weight",
}
_BIAS = {("fc", "bias"): "fc.bias"}
# Peers save a copy of the target's embedding with the draft; here it is always the target's own.
_BORROWED = "embed_tokens.weight"


def write_draft(directory: str | Path, config: DraftConfig, params: dict, flavour: str) -> None:
    """Write a draft for an engine. The directory appears whole or not at all.

    Args:
      directory: must not exist yet.
      config, params: from `init_draft` or `load_draft`; arrays keep their dtype.
      flavour: "eagle" or "vllm" (the same layout, but without an fc bias, which vLLM drops without a word).

    Raises:
      FileExistsError: the directory is there already.
      ValueError: the layout cannot say what the draft needs; the message names the field.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory}: already there; choose another --out or remove it")
    if flavour == "vllm" and config.fc_bias:
        raise ValueError(f"{directory}: fc_bias: vLLM ignores an fc bias, so τ would fall; train without --fc-bias")
    partial = directory.with_name(directory.name + ".partial")
    settings = _settings(config, jnp.asarray(params["fc"]["kernel"]).dtype.name)
    if partial.exists():  # of an export that was interrupted
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {}
    for leaf, name in _names(config.fc_bias).items():
        value = np.asarray(_at(params, leaf))
        tensors[name] = np.ascontiguousarray(value.T if leaf[-1] == "kernel" else value)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    for file in partial.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    partial.rename(directory)


def read_draft(directory: str | Path) -> tuple[DraftConfig, dict]:
    """A draft from the layout above, written here or by a peer, as (config, params).

    Raises:
      FileNotFoundError: config.json or the weights are missing, or only pickled weights are there.
      ValueError: a tensor is missing, unknown or misshapen, or a setting is not supported; the message names it.
    """
    directory = Path(directory)
    decoder = read_config(directory)
    params: dict = {}
    files = weight_files(directory)
    found = {}
    for file in files:
        with safe_open(file, framework="numpy") as handle:
            found |= {name: (file, handle.get_tensor(name)) for name in handle.keys() if name != _BORROWED}
    # EAGLE's own switch ("bias") is often left out or wrong, and means attention biases to vLLM: the file decides.
    has_bias = "fc.bias" in found
    config = DraftConfig(decoder, fc_bias=has_bias)
    names = _names(has_bias)
    shapes = _shapes(config)
    for name in sorted(set(found) - set(names.values())):
        raise ValueError(f"{found[name][0]}: unknown tensor {name}; an EAGLE-1/2 draft has {', '.join(names.values())}")
    for leaf, name in names.items():
        if name not in found:
            raise ValueError(f"{directory}: tensor {name} {list(shapes[name])} is missing; is this an EAGLE-1/2 draft?")
        file, value = found[name]
        if value.shape != shapes[name]:
            raise ValueError(f"{file}: tensor {name} has shape {list(value.shape)}, the config says {list(shapes[name])}")
        branch = params
        for key in leaf[:-1]:
            branch = branch.setdefault(key, {})
        branch[leaf[-1]] = jnp.asarray(value.T if leaf[-1] == "kernel" else value)
    return config, params


def is_exported(directory: str | Path) -> bool:
    """Whether a directory looks like an exported draft (as opposed to a training run's checkpoints)."""
    return (Path(directory) / "config.json").is_file() and any(Path(directory).glob("*.safetensors"))


def _names(fc_bias: bool) -> dict[tuple[str, ...], str]:
    return _NAMES | _BIAS if fc_bias else _NAMES


def _at(tree: dict, leaf: tuple[str, ...]):
    for key in leaf:
        tree = tree[key]
    return tree


def _shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Stored shape of every tensor."""
    d = config.decoder
    width, ffn = d.hidden_size, d.intermediate_size
    queries, keys = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    attention, mlp = _LAYER + "self_attn.", _LAYER + "mlp."
    return {
        "fc.weight": (width, 2 * width),
        "fc.bias": (width,),
        attention + "q_proj.weight": (queries, width),
        attention + "k_proj.weight": (keys, width),
        attention + "v_proj.weight": (keys, width),
        attention + "o_proj.weight": (width, queries),
        _LAYER + "post_attention_layernorm.weight": (width,),
        mlp + "gate_proj.weight": (ffn, width),
        mlp + "up_proj.weight": (ffn, width),
        mlp + "down_proj.weight": (width, ffn),
    }


def _settings(config: DraftConfig, dtype: str) -> dict:
    """config.json. Both bias switches are spelled out: a missing or true one makes engines build biases of their own."""
    d = config.decoder
    if d.embedding_scale != 1.0:
        raise ValueError(
            f"embedding_scale: the EAGLE layout cannot say that embeddings are scaled by {d.embedding_scale:g}, as this "
            "target does; such a draft can only be used from its checkpoint"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": d.hidden_size,
        "intermediate_size": d.intermediate_size,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim,
        "vocab_size": d.vocab_size,
        "max_position_embeddings": d.max_position,
        "rms_norm_eps": d.rms_norm_eps,
        "rope_theta": d.rope.theta,
        "rope_scaling": _rope_scaling(d.rope),
        "hidden_act": "silu",
        "tie_word_embeddings": d.tie_embeddings,
        "bias": config.fc_bias,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def _rope_scaling(rope: Rope) -> dict | None:
    if rope.frequency_divisors:
        raise ValueError(
            "rope: this target's GGUF stores its rope scaling as a table of divisors, which config.json cannot hold; "
            "train with the target's Hugging Face directory instead"
        )
    if rope.kind == "default":
        return None
    scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position
    return scaling
