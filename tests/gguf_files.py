"""Small GGUF files for tests: the golden models written with the gguf package's own writer and tensor names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from safetensors.numpy import load_file

from jsfdd.models.architecture import DecoderConfig

_ARCHITECTURES = {name: arch for arch, name in MODEL_ARCH_NAMES.items() if isinstance(arch, MODEL_ARCH)}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: each head's two halves, row by row in turn. Loops, to be trusted."""
    rows = len(weight) // heads
    order = []
    for head in range(heads):
        for row in range(rows // 2):
            order += [head * rows + row, head * rows + rows // 2 + row]
    return weight[order]


def write_model(
    path: Path,
    architecture: str,
    directory: Path,
    config: DecoderConfig,
    kinds: dict[str, GGMLQuantizationType] | None = None,
    edit=lambda writer: None,
) -> Path:
    """The weights of a Hugging Face directory as a GGUF file.

    `kinds`: GGUF tensor name -> type, F32 where absent. `edit(writer)` adds what else the file should hold.
    """
    writer = _with_settings(path, architecture, config)
    for name, tensor in _tensors(architecture, directory, config):
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    return finish(writer, edit)


def write_parts(folder: Path, architecture: str, directory: Path, config: DecoderConfig, count: int) -> list[Path]:
    """The same in `count` files as llama.cpp's gguf-split names and marks them: the settings are in the first alone."""
    folder.mkdir()
    tensors = list(_tensors(architecture, directory, config))
    paths = [folder / f"model-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = GGUFWriter(path, architecture) if number else _with_settings(path, architecture, config)
        for name, tensor in tensors[number::count]:
            writer.add_tensor(name, tensor)

        def marked(writer, number=number):
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", count)
            writer.add_int32("split.tensors.count", len(tensors))

        finish(writer, marked)
    return paths


def _with_settings(path: Path, architecture: str, config: DecoderConfig) -> GGUFWriter:
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.experts:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.chosen)
        writer.add_expert_feed_forward_length(config.experts.intermediate_size)
    return writer


def _tensors(architecture: str, directory: Path, config: DecoderConfig):
    """(name, values) as llama.cpp stores them."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    names = get_tensor_name_map(_ARCHITECTURES[architecture], config.num_layers)
    for name, tensor in _with_stacked_experts(tensors, config).items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleave(tensor, config.num_heads if "q_proj" in name else config.num_kv_heads)
        if architecture == "gemma3" and "norm" in name:
            tensor = tensor + np.float32(1)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor


def _with_stacked_experts(tensors, config: DecoderConfig):
    """X.experts.E.Y of all experts as one tensor X.experts.Y."""
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in tensors.keys() - stacked.keys():
        before, after = name.split(".experts.")
        part = after.partition(".")[2]
        experts = range(config.experts.count)
        stacked[f"{before}.experts.{part}"] = np.stack([tensors[f"{before}.experts.{e}.{part}"] for e in experts])
    return stacked


def write_vocabulary(path: Path, tokens, kinds, edit) -> Path:
    """A GGUF file that holds only a tokenizer: `tokens`, their types, and what `edit(writer)` adds."""
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    return finish(writer, edit)


def finish(writer: GGUFWriter, edit) -> Path:
    edit(writer)
    path = Path(writer.path)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
