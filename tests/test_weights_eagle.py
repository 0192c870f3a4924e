"""Drafts of others: both layouts are read strictly, and what is refused is named with a way out."""

import json
import shlex

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy import random_draft, toy_config

from jsfdd.models.draft import draft_config
from jsfdd.weights.card import Serving
from jsfdd.weights.eagle import is_exported, read_draft
from jsfdd.weights.export import write_draft


def _written(tmp_path, flavour="eagle"):
    config = draft_config(toy_config())
    write_draft(tmp_path / "draft", config, random_draft(config), flavour, serving=Serving("org/target"))
    return tmp_path / "draft", load_file(tmp_path / "draft" / "model.safetensors")


def _edit_settings(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("flavour", ["eagle", "speculators"])
def test_a_peers_copy_of_the_embedding_is_left_alone(tmp_path, flavour):
    directory, tensors = _written(tmp_path, flavour)
    save_file(tensors | {"embed_tokens.weight": np.zeros((64, 32), np.float32)}, directory / "model.safetensors")
    params = read_draft(directory).params
    assert set(params) == {"fc", "layer"}


def test_shards_are_read(tmp_path):
    directory, tensors = _written(tmp_path)
    whole = read_draft(directory).params
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert is_exported(directory)
    assert jax.tree.all(jax.tree.map(np.array_equal, read_draft(directory).params, whole))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("layers.0.mlp.up_proj.weight"), "up_proj.weight .* is missing"),
        (lambda t: t.update({"norm.weight": np.ones(32, np.float32)}), "unknown tensor norm.weight"),
        (lambda t: t.update({"fc.weight": np.ones((32, 96), np.float32)}), r"fc.weight has shape \[32, 96\]"),
        (lambda t: t.update({"fc.bias": np.ones((32, 1), np.float32)}), r"fc.bias has shape \[32, 1\]"),
        (lambda t: t.update({"fc.weight": np.ones((32, 64), np.int32)}), "fc.weight has type I32"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    directory, tensors = _written(tmp_path)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_draft(directory)


def test_a_truncated_file_is_named(tmp_path):
    directory, _ = _written(tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        read_draft(directory)


@pytest.mark.parametrize(
    "flavour, changes, message",
    [
        ("eagle", {"model_type": "qwen3"}, "model_type is 'qwen3'"),
        ("eagle", {"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ("eagle", {"attention_bias": True}, "attention_bias is True"),
        ("eagle", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("eagle", {"qkv_bias": True}, "_proj.bias .* is missing"),
        ("speculators", {"speculators_model_type": "eagle3"}, "describes an EAGLE-3 draft"),
        ("speculators", {"layernorms": True}, "layernorms is true"),
        ("speculators", {"fusion_bias": True}, "fusion_bias is True, but the weights say False"),
        ("speculators", {"transformer_layer_config": None}, "transformer_layer_config is None"),
        (
            "speculators",
            {"transformer_layer_config": {"model_type": "llama"}},
            "transformer_layer_config.vocab_size is missing",
        ),
    ],
)
def test_settings_that_would_change_the_draft_are_refused(tmp_path, flavour, changes, message):
    directory, _ = _written(tmp_path, flavour)
    _edit_settings(directory, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_draft(directory)
    assert "config.json" in str(error.value) or "tensor" in str(error.value)


def test_fc_bias_is_there_if_its_tensor_says_something(tmp_path):
    """EAGLE's switch is often left out or wrong. SGLang's obligatory zeros are none, unless the config asks for a bias."""
    directory, tensors = _written(tmp_path)
    for value, switch, expected in ((0.0, False, False), (0.0, True, True), (0.5, False, True), (0.5, True, True)):
        save_file(tensors | {"fc.bias": np.full(32, value, np.float32)}, directory / "model.safetensors")
        _edit_settings(directory, bias=switch)
        config, params, _ = read_draft(directory)
        assert config.fc_bias == expected == ("bias" in params["fc"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "it's a draft.pt"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path, name):
    directory, _ = _written(tmp_path)
    (directory / "model.safetensors").rename(directory / name)
    assert is_exported(directory)
    with pytest.raises(FileNotFoundError, match="never read") as error:
        read_draft(directory)
    python, option, script = shlex.split(str(error.value).partition("installed: ")[2])
    assert (python, option) == ("python", "-c")
    compile(script, "script", "exec")
    assert json.dumps(str(directory / name)) in script and json.dumps(str(directory / "model.safetensors")) in script
    assert "weights_only=True" in script


@pytest.mark.parametrize(
    "settings",
    [
        {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 64},
        {"architectures": ["Eagle3LlamaForCausalLM"]},
        {"draft_vocab_size": 32000},
    ],
)
def test_an_eagle1_draft_that_is_said_to_be_eagle3_is_named(tmp_path, settings):
    directory, _ = _written(tmp_path)
    _edit_settings(directory, **settings)
    with pytest.raises(ValueError, match=r"config\.json: describes an EAGLE-3 draft, and the weights are of EAGLE-1/2"):
        read_draft(directory)


def test_what_is_no_exported_draft(tmp_path):
    assert not is_exported(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # as in the directory of a run
    assert not is_exported(tmp_path)
