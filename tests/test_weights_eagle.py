"""Exported drafts: what is written is what engines load, and reading it back gives the same bits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy import toy_config

from jsfdd.models.architecture import Rope
from jsfdd.models.draft import draft_config, init_draft
from jsfdd.weights.eagle import read_draft, write_draft

ROPES = [
    Rope(1e5),
    Rope(5e5, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64),
    Rope(1e4, "linear", factor=4.0),
    Rope(1e6, "yarn", factor=4.0, original_max_position=128, attention_factor=1.2),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
@pytest.mark.parametrize("fc_bias", [False, True])
def test_round_trip_is_exact(tmp_path, rope, fc_bias):
    config = draft_config(toy_config(rope=rope), fc_bias)
    params = init_draft(config, jax.random.key(0))
    write_draft(tmp_path / "draft", config, params, "eagle")
    config_again, params_again = read_draft(tmp_path / "draft")
    assert config_again == config
    assert jax.tree.structure(params_again) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, params_again))


def test_the_layout_is_eagles(tmp_path):
    config = draft_config(toy_config())
    params = init_draft(config, jax.random.key(0))
    write_draft(tmp_path / "draft", config, params, "vllm")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {
        "fc.weight": (32, 64),
        "layers.0.self_attn.q_proj.weight": (32, 32),
        "layers.0.self_attn.k_proj.weight": (16, 32),
        "layers.0.self_attn.v_proj.weight": (16, 32),
        "layers.0.self_attn.o_proj.weight": (32, 32),
        "layers.0.post_attention_layernorm.weight": (32,),
        "layers.0.mlp.gate_proj.weight": (48, 32),
        "layers.0.mlp.up_proj.weight": (48, 32),
        "layers.0.mlp.down_proj.weight": (32, 48),
    }
    # y = W x: the first half of fc's columns multiplies the embedding.
    assert np.array_equal(tensors["fc.weight"][:, :32], np.asarray(params["fc"]["kernel"][:32]).T)
    settings = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"] and settings["num_hidden_layers"] == 1
    assert settings["bias"] is False and settings["attention_bias"] is False
    assert settings["max_position_embeddings"] == 512


def _written(tmp_path):
    config = draft_config(toy_config())
    write_draft(tmp_path / "draft", config, init_draft(config, jax.random.key(0)), "eagle")
    return tmp_path / "draft", load_file(tmp_path / "draft" / "model.safetensors")


def test_a_peers_copy_of_the_embedding_is_left_alone(tmp_path):
    directory, tensors = _written(tmp_path)
    save_file(tensors | {"embed_tokens.weight": np.zeros((64, 32), np.float32)}, directory / "model.safetensors")
    _, params = read_draft(directory)
    assert set(params) == {"fc", "layer"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("layers.0.mlp.up_proj.weight"), "up_proj.weight .* is missing"),
        (lambda t: t.update({"norm.weight": np.ones(32, np.float32)}), "unknown tensor norm.weight"),
        (lambda t: t.update({"fc.weight": np.ones((32, 96), np.float32)}), r"fc.weight has shape \[32, 96\]"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    directory, tensors = _written(tmp_path)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_draft(directory)


def test_only_pickled_weights_are_refused(tmp_path):
    directory, _ = _written(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled"):
        read_draft(directory)


def test_what_the_layout_cannot_say_is_refused_and_leaves_nothing(tmp_path):
    plain = draft_config(toy_config(), fc_bias=True)
    params = init_draft(plain, jax.random.key(0))
    with pytest.raises(ValueError, match="fc_bias"):
        write_draft(tmp_path / "a", plain, params, "vllm")
    scaled = dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, embedding_scale=5.6))
    with pytest.raises(ValueError, match="embedding_scale"):
        write_draft(tmp_path / "b", scaled, params, "eagle")
    divided = dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, rope=Rope(1e4, frequency_divisors=(1.0,) * 4)))
    with pytest.raises(ValueError, match="divisors"):
        write_draft(tmp_path / "c", divided, params, "eagle")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_never_overwritten(tmp_path):
    directory, tensors = _written(tmp_path)
    config = draft_config(toy_config())
    with pytest.raises(FileExistsError, match="already there"):
        write_draft(directory, config, init_draft(config, jax.random.key(9)), "eagle")
    assert np.array_equal(load_file(directory / "model.safetensors")["fc.weight"], tensors["fc.weight"])
