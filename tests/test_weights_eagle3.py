"""EAGLE-3 drafts of others: what their files leave out is what their engines take, and what would change a draft is named."""

import json
import shutil

import numpy as np
import pytest
from eagle3_drafts import WORDS, N, a_draft, same_params, written
from safetensors.numpy import save_file
from toy import random_draft, toy_config

from jsfdd.commands.cli import main
from jsfdd.models.draft import draft_config
from jsfdd.weights.eagle import read_draft
from jsfdd.weights.eagle3_settings import NORM_FLAGS


def _others(tmp_path, flavour="vllm", settings=(), tensors=None, **options):
    """(directory, config, params): a draft of `options` whose files say something else here and there (None: nothing)."""
    config, params = a_draft(**options)
    raw, found = written(tmp_path / "draft", flavour, (config, params))
    raw = {key: value for key, value in (raw | dict(settings)).items() if value is not None}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(raw))
    found = {name: x for name, x in (found | (tensors or {})).items() if x is not None}
    save_file(found, tmp_path / "draft" / "model.safetensors")
    return tmp_path / "draft", config, params


LAYERS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    "settings",
    [
        {"eagle_config": None},
        {LAYERS: None},
        {LAYERS: None, "eagle_config": None},
        {LAYERS: [6, 2, 4], "eagle_config": None},
        {
            "architectures": ["LlamaForCausalLM"],
            "torch_dtype": None,
            **dict.fromkeys(NORM_FLAGS),
            LAYERS: None,
            "eagle_config": None,
        },
        {"eagle_config": {LAYERS: [1, 3, 5], "norm_before_fc": False}},
    ],
    ids=str,
)
def test_what_peers_leave_out_is_what_their_engines_take(tmp_path, settings):
    directory, config, params = _others(tmp_path, settings=settings)
    again, params_again, _ = read_draft(directory, num_layers=N)
    assert again == config and same_params(params, params_again)


def test_layers_that_no_file_names_need_a_target(tmp_path):
    directory, *_ = _others(tmp_path, settings={LAYERS: None, "eagle_config": None})
    with pytest.raises(ValueError, match=rf'config.json: does not say which .* "{LAYERS}": \[2, N/2, N-3\]'):
        read_draft(directory)
    with pytest.raises(ValueError, match="5 layers, fewer than 7"):
        read_draft(directory, num_layers=5)


def test_nested_layers_alone_are_outputs(tmp_path):
    directory, *_ = _others(tmp_path, settings={LAYERS: None, "eagle_config": {LAYERS: [0, 1, 2]}})
    assert read_draft(directory).config.target_layers == (1, 2, 3)


@pytest.mark.parametrize("flag, where", [("norm_before_fc", "eagle_config"), ("fc_norm", "use_aux_norm")])
def test_norms_under_their_other_names(tmp_path, flag, where):
    nested = {LAYERS: [1, 3, 5], "norm_before_fc": True}
    other = {"eagle_config": nested} if where == "eagle_config" else {where: True}
    directory, config, params = _others(tmp_path, "sglang", {flag: None, **other}, **{flag: True})
    again, params_again, _ = read_draft(directory)
    assert again == config and same_params(params, params_again)


def test_a_flat_draft_with_numbered_layers_is_read(tmp_path):
    """As SGLang and vLLM accept it beside "midlayer"."""
    config, params = a_draft()
    _, found = written(tmp_path / "draft", "vllm", (config, params))
    renamed = {name.replace("midlayer.", "layers.0."): x for name, x in found.items()}
    save_file(renamed, tmp_path / "draft" / "model.safetensors")
    again, params_again, _ = read_draft(tmp_path / "draft")
    assert again == config and same_params(params, params_again)


def test_copies_of_the_targets_tensors_are_left_alone(tmp_path):
    copies = {"embed_tokens.weight": (64, 32), "verifier_norm.weight": (32,), "verifier_lm_head.weight": (7, 32)}
    directory, config, params = _others(tmp_path, "speculators", tensors={k: np.zeros(s, "f4") for k, s in copies.items()})
    assert same_params(params, read_draft(directory).params)


def test_rows_in_another_order_are_sorted_by_token(tmp_path):
    config, params = a_draft()
    _, found = written(tmp_path / "draft", "eagle", (config, params))
    order = np.array([3, 0, 6, 5, 1, 2, 4])
    shuffled = {"d2t": np.array(WORDS)[order] - np.arange(7), "lm_head.weight": found["lm_head.weight"][order]}
    save_file(found | shuffled, tmp_path / "draft" / "model.safetensors")
    again, params_again, _ = read_draft(tmp_path / "draft")
    assert again == config and same_params(params, params_again)


@pytest.mark.parametrize("kind", [np.int32, np.int8])
def test_a_map_of_other_whole_numbers_is_read(tmp_path, kind):
    directory, config, _ = _others(tmp_path, tensors={"d2t": (np.array(WORDS) - np.arange(7)).astype(kind), "t2d": None})
    assert read_draft(directory).config == config


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"d2t": np.array([0, 2, 1, 5, 17, 35, 57])}, "tensor d2t: rows 1 and 2 are both of token 3"),
        ({"d2t": np.array([3, -1, 6, 0, 17, 35, 57])}, "tensor d2t: rows 0 and 3 are both of token 3"),
        ({"d2t": np.array([0, 2, 5, 5, 17, 35, 58])}, "tensor d2t: row 6 would be of token 64, and the target has 64"),
        ({"d2t": np.array([-1, 2, 5, 5, 17, 35, 57])}, "tensor d2t: row 0 would be of token -1"),
        ({"d2t": np.array([0, 2, 5, 5, 17, 35])}, r"tensor d2t has shape \[6\], the config says \[7\]"),
        ({"d2t": np.zeros(7, "f4")}, "tensor d2t has type F32"),
        ({"d2t": None}, "draft_vocab_size is 7 of 64 tokens, but there is no tensor d2t"),
        ({"t2d": np.ones(64, bool)}, "tensor t2d marks other tokens than d2t"),
        ({"t2d": np.ones(63, bool)}, r"tensor t2d has shape \[63\], the config says \[64\]"),
        ({"lm_head.weight": None}, r"tensor lm_head.weight \[7, 32\] is missing"),
        ({"fc.weight": np.ones((32, 64), "f4")}, r"fc.weight has shape \[32, 64\], the config says \[32, 96\]"),
        ({"fc.bias": np.ones(31, "f4")}, r"fc.bias has shape \[31\]"),
        ({"input_norm.weight": np.ones(96, "f4")}, "unknown tensor input_norm.weight; an EAGLE-3 draft of these settings"),
        ({"midlayer.self_attn.q_norm.weight": np.ones(8, "f4")}, "unknown tensor midlayer.self_attn.q_norm.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_tensors_are_named(tmp_path, tensors, message):
    directory, *_ = _others(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=message) as error:
        read_draft(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    "flavour, settings, message",
    [
        ("vllm", {LAYERS: [1, 4, 6]}, r"enters the target's layers \[1, 4, 6\], and in eagle_config.* \[2, 4, 6\]"),
        ("vllm", {LAYERS: [2, 2, 6]}, r"\[2, 2, 6\] names a layer twice"),
        ("vllm", {LAYERS: "2,4,6"}, "is '2,4,6', not a list of layer numbers"),
        ("vllm", {LAYERS: [2, 4.5, 6]}, "not a list of layer numbers"),
        ("vllm", {LAYERS: None, "eagle_config": {LAYERS: [-2, 3, 5]}}, r"target layers \[-1, 4, 6\]"),
        ("vllm", {"eagle_config": [1]}, r"eagle_config is \[1\], not an object"),
        ("vllm", {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is False"),
        ("vllm", {"target_hidden_size": 64}, "target_hidden_size is 64 and hidden_size 32"),
        ("vllm", {"draft_vocab_size": 65}, "draft_vocab_size is 65"),
        ("vllm", {"draft_vocab_size": "7"}, "draft_vocab_size is '7'"),
        ("vllm", {"fc_norm": True, "norm_before_fc": True}, "fc_norm norms the streams one by one"),
        ("vllm", {"fc_norm": True}, "tensor fc_norm.0.weight .* is missing"),
        ("vllm", {"norm_output": "yes"}, "norm_output is 'yes', neither true nor false"),
        ("vllm", {"num_hidden_layers": 2}, "num_hidden_layers is 2; only drafts of one layer"),
        ("vllm", {"model_type": "qwen3"}, "model_type is 'qwen3'; only drafts of a llama layer"),
        ("vllm", {"layer_types": ["sliding_attention"]}, "layer_types has sliding_attention"),
        ("vllm", {"attention_bias": True}, "attention_bias is True"),
        ("speculators", {"embed_requires_grad": True}, "embed_requires_grad is true"),
        ("speculators", {"norm_before_residual": None}, "norm_before_residual is missing, for which vLLM takes true"),
        ("speculators", {"speculators_model_type": "peagle"}, "speculators_model_type is 'peagle'; eagle and eagle3 are read"),
    ],
)
def test_settings_that_would_change_the_draft_are_refused(tmp_path, flavour, settings, message):
    directory, *_ = _others(tmp_path, flavour, settings)
    with pytest.raises(ValueError, match=message) as error:
        read_draft(directory)
    assert "draft" in str(error.value) and (str(directory) in str(error.value))


def test_a_damaged_map_ends_a_command_with_2(tmp_path, capsys):
    directory, *_ = _others(tmp_path, tensors={"d2t": np.array([0, 2, 1, 5, 17, 35, 57])})
    assert main(["export", "--draft", str(directory), "--out", str(tmp_path / "out")]) == 2
    assert "rows 1 and 2 are both of token 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_config_and_weights_of_two_kinds_are_named(tmp_path):
    for name, draft in (("one", (draft_config(toy_config()), None)), ("three", a_draft())):
        config, params = draft
        written(tmp_path / name, "eagle", (config, params or random_draft(config)))
    shutil.copytree(tmp_path / "one", tmp_path / "mixed")
    shutil.copy(tmp_path / "three" / "model.safetensors", tmp_path / "mixed")
    with pytest.raises(
        ValueError, match=r"config.json: describes an EAGLE-1/2 draft, and the weights are of EAGLE-3 \(tensor mid"
    ):
        read_draft(tmp_path / "mixed")
    shutil.copy(tmp_path / "three" / "config.json", tmp_path / "mixed")
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "mixed")
    with pytest.raises(
        ValueError, match=r"config.json: describes an EAGLE-3 draft, and the weights are of EAGLE-1/2 \(no tensor"
    ):
        read_draft(tmp_path / "mixed")
