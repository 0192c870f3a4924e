"""Read the safetensors of a Hugging Face directory into the params tree.

Files of transformers 4 and 5 are read, without torch. A setting or tensor that would change the model, but that jsfdd does not
support, is an error and never ignored. Pickled weights (.bin, .pt) are never opened.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from jsfdd.base.files import check_no_pointer
from jsfdd.models.architecture import DecoderConfig
from jsfdd.weights import fp8
from jsfdd.weights.huggingface_config import (
    adds_one,
    is_wrapped,
    quantised_block,
    read_config,
    read_ends_config,
    read_object,
    refuse_adapter,
)
from jsfdd.weights.layout import Index, Source, fill_params

__all__ = ["read_config", "read_ends_config", "read_params"]

_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\]+\.safetensors")
_FLOATS = ("F32", "F16", "BF16")

_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "layers/input_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/attention/q_proj/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/k_proj/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/v_proj/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/o_proj/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/attention/q_proj/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/k_proj/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/v_proj/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attention/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/mlp/gate_proj/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up_proj/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down_proj/kernel": "model.layers.{}.mlp.down_proj.weight",
}
_QWEN_EXPERTS = {
    "layers/mlp/router/kernel": "model.layers.{}.mlp.gate.weight",
    "layers/mlp/gate_experts/kernel": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers/mlp/up_experts/kernel": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "layers/mlp/down_experts/kernel": "model.layers.{}.mlp.experts.{}.down_proj.weight",
}
_MIXTRAL_EXPERTS = {
    "layers/mlp/router/kernel": "model.layers.{}.block_sparse_moe.gate.weight",
    "layers/mlp/gate_experts/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "layers/mlp/up_experts/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "layers/mlp/down_experts/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}
# Gemma-3 calls the norm after attention what all others call the norm before the MLP.
_GEMMA_NAMES = {
    "layers/post_attention_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/post_mlp_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}

# Buffers, not parameters: old checkpoints store the rotary frequencies that the config already fixes.
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# What an image model has beside its text decoder, and the two spellings of that decoder's prefix.
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|visual)\.")
_WRAPPED_PREFIX = re.compile(r"(language_model\.model\.|model\.language_model\.)")
_WRAPPED_HEAD = "language_model.lm_head.weight"
# Where a model of any kind has the parts outside of its layers.
_DECODERS = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files that hold a directory's weights, sorted: one, or the shards that its index names.

    Raises:
      FileNotFoundError: there are none, or a shard is missing.
      ValueError: the index is malformed, or names a shard outside the directory.
    """
    directory = Path(directory)
    index = directory / _INDEX
    single = directory / "model.safetensors"
    if index.exists():
        files = sorted({directory / shard for shard in _weight_map(index).values()})
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{index}: names {file.name}, which is not in {directory}; download it again")
        return files
    if single.is_file():
        return [single]
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickled:
        raise FileNotFoundError(
            f"{directory}: only pickled weights ({pickled[0]}), which can run code when opened and are never read. "
            "Convert them once, where torch is installed: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    shards = sorted(directory.glob("*-of-*.safetensors"))
    if shards:
        raise FileNotFoundError(
            f"{directory / _INDEX}: not there, but {len(shards)} shards of a model are ({shards[0].name}, …); download it too"
        )
    refuse_adapter(directory)
    raise FileNotFoundError(f"{directory}: neither model.safetensors nor {_INDEX} is there")


def weight_sources(directory: str | Path) -> dict[str, Source]:
    """Every tensor of a directory's safetensors files by name, to be read on demand.

    Raises:
      FileNotFoundError: no weights, or a shard is missing.
      ValueError: a file is truncated or corrupt, a tensor is there twice or not where the index says; on reading one, it
        is not F32, F16 or BF16, or F8_E4M3, which only `fp8.dequantised` reads.
    """
    directory = Path(directory)
    sources: dict[str, Source] = {}
    for file in weight_files(directory):
        for name, source in _sources_in(file).items():
            if name in sources:
                raise ValueError(f"{file}: tensor {name} is in {sources[name].file} too; which one holds?")
            sources[name] = source
    _check_index(directory, sources)
    return sources


def _sources_in(file: Path) -> dict[str, Source]:
    """A source for every tensor of a safetensors file, from its header alone."""
    with open_tensors(file) as handle:
        headers = {name: handle.get_slice(name) for name in handle.keys()}
        return {
            name: Source(file, tuple(header.get_shape()), functools.partial(_read, file, name), header.get_dtype())
            for name, header in headers.items()
        }


def read_params(directory: str | Path, config: DecoderConfig, dtype=np.float32, mesh: Mesh | None = None) -> dict:
    """The params tree of a directory's weights as JAX arrays of `dtype` (layout: `layout.fill_params`).

    With a `mesh` each process reads from the files what its own devices hold.

    Raises:
      FileNotFoundError: no weights, or a shard is missing.
      ValueError: a file is truncated or corrupt; a tensor is missing, unknown, misshapen or not F32, F16, BF16 or, with its
        scales, F8_E4M3.
    """
    directory = Path(directory)
    names, transforms = _NAMES | (_MIXTRAL_EXPERTS if config.family == "mistral" else _QWEN_EXPERTS), {}
    if config.family == "gemma3":
        names = names | _GEMMA_NAMES
        # Gemma's norms compute x · (1 + w); here scales multiply as they are.
        transforms = {leaf: _one_plus for leaf in names if leaf.endswith("/scale")}
    stored = fp8.dequantised(weight_sources(directory), quantised_block(directory))
    sources = _decoder_sources(stored, config, is_wrapped(directory))
    return fill_params(config, names, sources, dtype, directory, transforms, mesh)


def end_files(directory: str | Path) -> list[str]:
    """The names of the safetensors files with the parts of a model that are not its layers. Errors as in `read_end_params`."""
    directory = Path(directory)
    if not (directory / _INDEX).exists():
        return ["model.safetensors"]
    weight_map = _weight_map(directory / _INDEX)
    return sorted({weight_map[name] for name in _end_names(directory / _INDEX, weight_map).values()})


def read_end_params(directory: str | Path, config: DecoderConfig, dtype=np.float32, mesh: Mesh | None = None) -> dict:
    """The embedding, the final norm and the head of a model whose layers may be of any kind; of the rest nothing is read.

    Raises:
      FileNotFoundError: a file with one of them is missing.
      ValueError: as in `read_params`, of these tensors.
    """
    directory = Path(directory)
    sources: dict[str, Source] = {}
    for file in (directory / name for name in end_files(directory)):
        if not file.is_file():
            weight_files(directory)  # says what is there in its place
            raise FileNotFoundError(f"{file}: missing; download it again")
        sources |= _sources_in(file)
    names = _end_names(directory, sources)
    if config.tie_embeddings:
        names.pop("head/kernel", None)
    elif "head/kernel" not in names:
        raise ValueError(f"{directory}: no tensor {_HEADS[0]} in it, and the config does not tie the head to the embedding")
    transforms = {"norm/scale": _one_plus} if adds_one(directory) else {}
    ends = {name: sources[name] for name in names.values()}
    for name, source in ends.items():
        if source.kind not in _FLOATS:
            raise ValueError(f"{source.file}: tensor {name} has type {source.kind}; supported are {', '.join(_FLOATS)}")
    return fill_params(config, names, ends, dtype, directory, transforms, mesh, layers=False)


def _end_names(where: Path, tensors: Collection[str]) -> dict[str, str]:
    """Leaf -> tensor, of the embedding, the final norm and, if there is one, the head."""
    for prefix in _DECODERS:
        names = {"embed/embedding": f"{prefix}embed_tokens.weight", "norm/scale": f"{prefix}norm.weight"}
        if all(name in tensors for name in names.values()):
            head = next((name for name in _HEADS if name in tensors), None)
            return names if head is None else names | {"head/kernel": head}
    raise ValueError(
        f"{where}: no embedding (embed_tokens.weight) with a final norm (norm.weight) beside it under any of the names "
        f"{', '.join(prefix + '*' for prefix in _DECODERS)}"
    )


def _decoder_sources(found: dict[str, Source], config: DecoderConfig, wrapped: bool) -> dict[str, Source]:
    """Rename `found` as in a plain text decoder, and leave out what is known not to be one of its parameters."""
    sources = {}
    for name, source in found.items():
        if _ROTARY_BUFFER.fullmatch(name):
            continue
        if wrapped:
            if _VISION.match(name):
                continue
            name = "lm_head.weight" if name == _WRAPPED_HEAD else _WRAPPED_PREFIX.sub("model.", name, count=1)
        sources[name] = source
    if config.tie_embeddings and "lm_head.weight" in sources:
        # Some writers save a tied head as well. transformers overwrites it with the embedding, so it is not read.
        head = sources.pop("lm_head.weight")
        if head.shape != (config.vocab_size, config.hidden_size):
            raise ValueError(
                f"{head.file}: tensor lm_head.weight has shape {list(head.shape)}; tied to the embedding it must have "
                f"{[config.vocab_size, config.hidden_size]}"
            )
    return sources


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map from tensor names to files")
    for name, shard in weight_map.items():
        # A plain file name: a path could leave the directory by way of "..".
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(f"{index}: tensor {name} is said to be in {shard!r}, which is no .safetensors file beside it")
    return weight_map


def _check_index(directory: Path, sources: dict[str, Source]) -> None:
    index = directory / _INDEX
    for name, shard in _weight_map(index).items() if index.exists() else ():
        if name not in sources or sources[name].file.name != shard:
            raise ValueError(f"{directory / shard}: tensor {name} is missing, though {_INDEX} says that it is there")


@contextlib.contextmanager
def open_tensors(file: Path):
    """Open a safetensors file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is cut short, corrupt, or a pointer to another.
    """
    if not file.is_file():  # a pipe would block, and of a directory the package names no file
        raise FileNotFoundError(f"{file}: not there, or a link to nothing, or no plain file; remove it, or write it again")
    check_no_pointer(file)
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); download or write it again") from error


def _read(file: Path, name: str, index: Index) -> np.ndarray:
    # Opened for each tensor: a file that stays open stays mapped, and every page that was read counts as memory in use.
    with open_tensors(file) as handle:
        tensor = handle.get_slice(name)
        kind = tensor.get_dtype()
        if kind not in _FLOATS:
            raise ValueError(f"{file}: tensor {name} has type {kind}; supported are {', '.join(_FLOATS)}")
        return tensor[index]


def _one_plus(weight: np.ndarray) -> np.ndarray:
    return np.float32(1.0) + weight.astype(np.float32)
