"""GGUF reading: the same parameters as from the Hugging Face directory, and no file that is broken taken for whole."""

import dataclasses
import struct
from pathlib import Path

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from safetensors.numpy import load_file

from jsfdd.models.architecture import Rope
from jsfdd.weights import gguf, gguf_file, huggingface, layout
from jsfdd.weights.gguf_file import read_header, read_tensor
from jsfdd.weights.target import fingerprint

GOLDEN = Path(__file__).parent / "golden"


def write(tmp_path, architecture, family=None, **options):
    directory = GOLDEN / (family or architecture)
    config = huggingface.read_config(directory)
    path = gguf_files.write_model(tmp_path / "model.gguf", architecture, directory, config, **options)
    return path, directory, config


@pytest.mark.parametrize(
    "architecture, family",
    [
        *[("llama", "llama"), ("llama", "mistral"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma3", "gemma3")],
        *[("qwen3moe", "qwen3_moe"), ("llama", "mixtral")],
    ],
)
def test_same_params_as_the_directory(tmp_path, architecture, family):
    path, directory, config = write(tmp_path, architecture, family)
    stored = gguf.read_config(read_header(path))
    assert stored.tie_embeddings == config.tie_embeddings
    # A GGUF file holds neither Gemma's query scale nor its local rope; `test_gemma_windows_and_scales` looks at those.
    not_stored = {"family", "rope", "rms_norm_eps", "query_scale", "local_rope", "sliding_layers"}
    if config.experts:  # nor whether their weights are normalised: llama.cpp does so
        config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, normalised=True))
    for field in dataclasses.fields(config):
        assert field.name in not_stored or getattr(stored, field.name) == getattr(config, field.name), field.name
    got, expected = gguf.read_params(read_header(path), stored), huggingface.read_params(directory, config)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (where, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(a, b), where


def test_experts_that_are_quantised_or_missing(tmp_path):
    name = "blk.1.ffn_gate_exps.weight"
    path, _, config = write(tmp_path, "qwen3moe", "qwen3_moe", kinds={name: GGMLQuantizationType.Q8_0})
    file = read_header(path)
    got = gguf.read_params(file, gguf.read_config(file))["layers"]["mlp"]["gate_experts"]["kernel"][1]
    np.testing.assert_array_equal(got, read_tensor(file, name).swapaxes(1, 2))
    one_fewer = file.tensors[name]._replace(shape=(5, 20, 32))
    with pytest.raises(ValueError, match=r"tensor blk.1.ffn_gate_exps.weight\[5\] \[20, 32\] is missing"):
        gguf.read_params(file._replace(tensors=file.tensors | {name: one_fewer}), config)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_types(tmp_path, kind):
    kind = GGMLQuantizationType[kind]
    kinds = {"blk.1.ffn_gate.weight": kind, "blk.0.attn_q.weight": kind, "token_embd.weight": kind}
    path, directory, config = write(tmp_path, "llama", kinds=kinds)
    params = gguf.read_params(read_header(path), gguf.read_config(read_header(path)))
    raw = load_file(directory / "model.safetensors")

    def rounded(name, permute=lambda weight: weight):
        weight = permute(raw[name])
        return dequantize(quantize(weight, kind).reshape(len(weight), -1), kind)

    gate = params["layers"]["mlp"]["gate_proj"]["kernel"][1]
    assert np.array_equal(gate, rounded("model.layers.1.mlp.gate_proj.weight").T)
    assert np.array_equal(params["embed"]["embedding"], rounded("model.embed_tokens.weight"))
    query = rounded("model.layers.0.self_attn.q_proj.weight", lambda w: gguf_files.interleave(w, config.num_heads))
    got = np.asarray(params["layers"]["attention"]["q_proj"]["kernel"][0]).T
    assert np.array_equal(gguf_files.interleave(got, config.num_heads), query)
    # Rows of 32 share one scale, so rounding must not have crossed rows: close to the original too.
    np.testing.assert_allclose(got, raw["model.layers.0.self_attn.q_proj.weight"], atol=0.15)


def test_in_whatever_pieces_the_same_parameters(tmp_path, monkeypatch):
    """Pieces of 64 rows on several threads, dequantised one block at a time, against each tensor at once."""
    kinds = dict.fromkeys(("blk.1.ffn_gate.weight", "blk.0.attn_q.weight", "token_embd.weight"), GGMLQuantizationType.Q8_0)
    file = read_header(write(tmp_path, "llama", kinds=kinds)[0])
    config = gguf.read_config(file)
    expected = gguf.read_params(file, config)
    monkeypatch.setattr(layout, "_PIECE", 1)
    monkeypatch.setattr(gguf_file, "_CHUNK", 32)
    got = gguf.read_params(file, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, got, expected))
    embedding = read_tensor(file, "token_embd.weight")
    assert len(embedding) == 128 and np.array_equal(read_tensor(file, "token_embd.weight", slice(3, 70)), embedding[3:70])


def test_a_model_in_parts_is_the_model_in_one(tmp_path):
    """In whatever part it is asked for, metadata in the first alone; and every way in which parts do not fit together."""
    whole, directory, config = write(tmp_path, "llama")
    parts = gguf_files.write_parts(tmp_path / "parts", "llama", directory, config, 3)
    expected = gguf.read_params(read_header(whole), gguf.read_config(read_header(whole)))
    for part in parts:
        file = read_header(part)
        assert file.path == parts[0] and gguf.read_config(file) == gguf.read_config(read_header(whole))
        assert {tensor.path for tensor in file.tensors.values()} == set(parts)
        assert jax.tree.all(jax.tree.map(np.array_equal, gguf.read_params(file, config), expected))
    first = fingerprint(parts[0], config)
    assert first == fingerprint(parts[2], config) != fingerprint(whole, config)
    stored = parts[2].read_bytes()
    parts[2].write_bytes(stored[:-1] + b"!")
    assert fingerprint(parts[0], config) != first
    parts[2].write_bytes(stored[:-4096])
    with pytest.raises(ValueError, match=r"00003-of-00003\.gguf: tensor .*the file is truncated"):
        read_header(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(ValueError, match=r"00003-of-00003\.gguf: not part 3 of 3, as its name says"):
        read_header(parts[0])
    parts[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"00003-of-00003\.gguf: no such file; .*get all of them"):
        read_header(parts[1])


def test_bfloat16_throughout(tmp_path):
    """What llama.cpp writes of most models today: matrices in bfloat16, norms in float32."""
    names = [name for name in read_header(write(tmp_path, "llama")[0]).tensors if not name.endswith("norm.weight")]
    path, directory, config = write(tmp_path, "llama", kinds=dict.fromkeys(names, GGMLQuantizationType.BF16))
    got, exact = gguf.read_params(read_header(path), config), huggingface.read_params(directory, config)
    rounded = jax.tree.map(lambda x: x if x.ndim < 2 or x.shape[-1] == 1 else x.astype(jnp.bfloat16).astype(np.float32), exact)
    norms = ("input_norm", "mlp_norm")
    rounded["layers"] |= {name: exact["layers"][name] for name in norms}
    assert jax.tree.all(jax.tree.map(np.array_equal, got, rounded))


def test_rope_divisors_become_config(tmp_path):
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    path, *_ = write(tmp_path, "llama", edit=lambda w: w.add_tensor("rope_freqs.weight", divisors))
    assert gguf.read_config(read_header(path)).rope == Rope(10_000.0, frequency_divisors=tuple(divisors.tolist()))
    gguf.read_params(read_header(path), gguf.read_config(read_header(path)))  # and it is no unknown tensor


def test_rope_scaling(tmp_path):
    def yarn(writer):
        writer.add_string("qwen3.rope.scaling.type", "yarn")
        writer.add_float32("qwen3.rope.scaling.factor", 4.0)
        writer.add_uint32("qwen3.rope.scaling.original_context_length", 64)

    path, _, config = write(tmp_path, "qwen3", edit=yarn)
    assert dataclasses.asdict(gguf.read_config(read_header(path)).rope) == dataclasses.asdict(config.rope)


def test_gemma_windows_and_scales(tmp_path):
    pattern = "gemma3.attention.sliding_window_pattern"
    path, _, config = write(tmp_path, "gemma3", edit=lambda w: w.add_uint32(pattern, 3))
    stored = gguf.read_config(read_header(path))
    assert stored.sliding_layers == (True, True, False, True) == config.sliding_layers
    assert stored.embedding_scale == 32**0.5 and stored.query_scale == 16**-0.5
    assert stored.local_rope == Rope(10_000.0)
    path, *_ = write(tmp_path, "gemma3")
    assert gguf.read_config(read_header(path)).sliding_layers == (True,) * 4  # every sixth layer is full


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda w: w.add_expert_count(8), "llama.expert_used_count is missing"),
        (lambda w: (w.add_expert_count(2), w.add_expert_used_count(3)), "num_experts_per_tok=3 is more than num_experts=2"),
        (lambda w: (w.add_expert_count(2), w.add_expert_shared_count(1)), "expert_shared_count is 1: not supported"),
        (lambda w: (w.add_expert_count(2), w.add_expert_weights_norm(False)), "expert_weights_norm is False: not supported"),
        (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "longrope.*supported are none, linear, yarn"),
        (lambda w: w.add_uint32("llama.rope.dimension_count", 4), "rope.dimension_count"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts.*-00001-of-00003.gguf.*llama-gguf-split --merge"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)), r"unknown tensor blk.0.attn_q.bias"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32)), r"rope_freqs.weight has shape \[3\]; 8"),
    ],
)
def test_unsupported(tmp_path, edit, message):
    path, *_ = write(tmp_path, "llama", edit=edit)
    with pytest.raises(ValueError, match=message) as error:
        gguf.read_params(read_header(path), gguf.read_config(read_header(path)))
    assert str(path) in str(error.value)


def test_unknown_architecture(tmp_path):
    path = gguf_files.finish(GGUFWriter(tmp_path / "a.gguf", "mamba"), lambda w: None)
    with pytest.raises(ValueError, match="'mamba'; supported are llama, qwen2, qwen3, qwen3moe, gemma3"):
        gguf.read_config(read_header(path))


def test_missing_and_misshapen_tensor(tmp_path):
    path, _, config = write(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"tensor blk.2.attn_norm.weight \[32\] is missing"):
        gguf.read_params(read_header(path), dataclasses.replace(config, num_layers=3))
    with pytest.raises(ValueError, match=r"blk.0.ffn_gate.weight has shape \[48, 32\], the config says \[64, 32\]"):
        gguf.read_params(read_header(path), dataclasses.replace(config, intermediate_size=64))


def test_truncated_anywhere(tmp_path):
    """Every cut is a ValueError that names the file; a cut of the data section is found before data is read."""
    path, *_ = write(tmp_path, "llama", edit=lambda w: w.add_array("some.words", ["alpha", "beta"]))
    whole = path.read_bytes()
    end_of_data = max(t.offset + t.num_bytes for t in read_header(path).tensors.values())
    header_end = min(t.offset for t in read_header(path).tensors.values())
    cuts = [0, 3, 4, 8, 23, 24, 25, 40, header_end - 40, header_end, header_end + 1, end_of_data - 1]
    cuts += list(range(26, header_end, 61))
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError) as error:
            gguf.read_config(read_header(path))
        assert str(path) in str(error.value), cut
    path.write_bytes(whole[:end_of_data])
    gguf.read_config(read_header(path))


def test_flipped_bytes_never_escape(tmp_path):
    """Whatever header byte is damaged: read as another model, or a ValueError; no other exception, no long loop."""
    path, *_ = write(tmp_path, "llama", edit=lambda w: w.add_array("some.numbers", [1, 2, 3]))
    whole = path.read_bytes()
    header_end = min(t.offset for t in read_header(path).tensors.values())
    for position in range(0, header_end, 7):
        for value in (0x00, 0x7F, 0xFF):
            damaged = bytearray(whole)
            damaged[position] = value
            path.write_bytes(damaged)
            try:
                gguf.read_config(read_header(path))
            except ValueError as error:
                assert str(path) in str(error), (position, value)


@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 10**12])
@pytest.mark.parametrize("field", ["tensors", "keys", "string", "array"])
def test_hostile_counts_allocate_nothing(tmp_path, count, field):
    tensors, keys, value = (count, 0, b"") if field == "tensors" else (0, count, b"")
    if field == "string":
        tensors, keys, value = 0, 1, struct.pack("<Q1sIQ", 1, b"k", 8, count)
    if field == "array":
        tensors, keys, value = 0, 1, struct.pack("<Q1sIIQ", 1, b"k", 9, 0, count)
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + value + bytes(64))
    with pytest.raises(ValueError, match=f"is {count}, more than"):
        read_header(path)


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ValueError, match="does not begin with GGUF"):
        read_header(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(60))
    with pytest.raises(ValueError, match="GGUF version 1; versions 2 and 3"):
        read_header(path)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(60))
    with pytest.raises(ValueError, match="big-endian"):
        read_header(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_header(tmp_path / "absent.gguf")


def test_file_that_shrinks_after_its_header(tmp_path):
    path, *_ = write(tmp_path, "llama")
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-60_000])
    name = max(header.tensors, key=lambda name: header.tensors[name].offset)
    with pytest.raises(ValueError, match="has shrunk"):
        read_tensor(header, name)
