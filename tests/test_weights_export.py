"""Flavours: what is written is what each engine's loader looks for, and reading it back gives the same bits.

The engines' loaders are encoded here as data: which parameters their draft model has for a config.json, and where a tensor
of the file goes. A parameter that no tensor reaches stays uninitialised memory, a tensor that goes nowhere is lost.
"""

import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from toy import LAYER_SETTINGS, random_draft, toy_config

from jsfdd.models.architecture import Rope
from jsfdd.models.draft import draft_config
from jsfdd.weights.card import Provenance, Serving
from jsfdd.weights.draft import load_draft
from jsfdd.weights.eagle import read_draft
from jsfdd.weights.export import write_draft
from jsfdd.weights.flavours import check_flavour

FLAVOURS = ["eagle", "vllm", "sglang", "speculators"]
SERVING = Serving("org/target", 3)
ROPES = {
    "default": Rope(1e5),
    "linear": Rope(1e4, "linear", factor=4.0),
    "llama3": Rope(5e5, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64),
    "yarn": Rope(1e6, "yarn", factor=4.0, original_max_position=128, attention_factor=1.2),
}


def a_draft(fc_bias=False, **changes):
    """(config, params) with no value zero, so that nothing is equal by chance."""
    config = draft_config(toy_config(**changes), fc_bias)
    params = random_draft(config)
    keys = jax.random.split(jax.random.key(1), 64)
    leaves, tree = jax.tree.flatten(params)
    return config, jax.tree.unflatten(tree, [0.1 + jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves)])


def written(directory, flavour, draft, **options):
    """(settings, tensors) of an exported draft."""
    write_draft(directory, *draft, flavour, serving=SERVING, **options)
    return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")


def represents(flavour, config):
    try:
        check_flavour(config, flavour, SERVING)
    except ValueError:
        return False
    return True


EVERYTHING = [(flavour, kind, bias) for flavour in FLAVOURS for kind in ROPES for bias in (False, True)]
REPRESENTED = [case for case in EVERYTHING if represents(case[0], draft_config(toy_config(rope=ROPES[case[1]]), case[2]))]


# ---- round trip


@pytest.mark.parametrize("flavour, rope, fc_bias", REPRESENTED)
def test_round_trip_is_exact(tmp_path, flavour, rope, fc_bias):
    config, params = a_draft(fc_bias, rope=ROPES[rope])
    written(tmp_path / "draft", flavour, (config, params))
    config_again, params_again, _ = read_draft(tmp_path / "draft")
    assert config_again == config
    assert jax.tree.structure(params_again) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, params_again))


def test_what_flavours_can_represent():
    assert set(EVERYTHING) - set(REPRESENTED) == {
        *(("eagle", kind, bias) for kind in ("llama3", "yarn") for bias in (False, True)),
        *(("vllm", kind, True) for kind in ROPES),
        *(("sglang", "yarn", bias) for bias in (False, True)),
    }


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_has_the_dtype_that_was_asked_for(tmp_path, flavour, dtype):
    config, params = a_draft()
    settings, tensors = written(tmp_path / "draft", flavour, (config, params), dtype=dtype)
    assert {value.dtype.name for value in tensors.values()} == {dtype} == {settings["torch_dtype"]}
    again = read_draft(tmp_path / "draft").params
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a).astype(kind), b), params, again))
    # Exported once more as it is: the same bits.
    _, second = written(tmp_path / "again", flavour, read_draft(tmp_path / "draft")[:2])
    assert tensors.keys() == second.keys() and all(np.array_equal(tensors[name], second[name]) for name in tensors)


# ---- layouts

_FLAT = {
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
_NESTED = {
    "fusion_fc.weight": (32, 64),
    "transformer.self_attn.q_proj.weight": (32, 32),
    "transformer.self_attn.k_proj.weight": (16, 32),
    "transformer.self_attn.v_proj.weight": (16, 32),
    "transformer.self_attn.o_proj.weight": (32, 32),
    "transformer.post_attention_layernorm.weight": (32,),
    "transformer.mlp.gate_proj.weight": (48, 32),
    "transformer.mlp.up_proj.weight": (48, 32),
    "transformer.mlp.down_proj.weight": (32, 48),
}
GOLDEN = {"eagle": _FLAT, "vllm": _FLAT, "sglang": _FLAT | {"fc.bias": (32,)}, "speculators": _NESTED}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_names_shapes_and_values(tmp_path, flavour):
    config, params = a_draft()
    _, tensors = written(tmp_path / "draft", flavour, (config, params))
    assert {name: value.shape for name, value in tensors.items()} == GOLDEN[flavour]
    fc, layer = ("fusion_fc", "transformer") if flavour == "speculators" else ("fc", "layers.0")
    # y = W x: the first half of fc's columns multiplies the embedding.
    assert np.array_equal(tensors[f"{fc}.weight"][:, :32], np.asarray(params["fc"]["kernel"][:32]).T)
    for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
        kernel = params["layer"]["attention"][module]["kernel"]
        assert np.array_equal(tensors[f"{layer}.self_attn.{module}.weight"], np.asarray(kernel).T)
    for module in ("gate_proj", "up_proj", "down_proj"):
        assert np.array_equal(tensors[f"{layer}.mlp.{module}.weight"], np.asarray(params["layer"]["mlp"][module]["kernel"]).T)
    assert np.array_equal(tensors[f"{layer}.post_attention_layernorm.weight"], params["layer"]["mlp_norm"]["scale"])
    if flavour == "sglang":
        assert not tensors["fc.bias"].any()


FLAT_CASES = [("eagle", True), ("eagle", False), ("vllm", False), ("sglang", True), ("sglang", False)]


@pytest.mark.parametrize("flavour, bias", FLAT_CASES)
def test_settings_of_flat_flavours(tmp_path, flavour, bias):
    settings, _ = written(tmp_path / "draft", flavour, a_draft(bias, rope=ROPES["default"], tie_embeddings=True))
    name = "LlamaForCausalLMEagle" if flavour == "sglang" else "LlamaForCausalLM"
    said = bias and flavour == "eagle"  # to the others this switch is the attention's
    assert settings == {"architectures": [name], **LAYER_SETTINGS, "bias": said, "torch_dtype": "float32"}


@pytest.mark.parametrize("bias", [False, True])
def test_settings_of_speculators(tmp_path, bias):
    settings, _ = written(tmp_path / "draft", "speculators", a_draft(bias, rope=ROPES["default"]))
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    assert settings == {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "speculators_model_type": "eagle",
        "speculators_version": "0.4.0.1",
        "speculators_config": {
            "algorithm": "eagle",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": "org/target", "architectures": []},
        },
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "transformer_layer_config": LAYER_SETTINGS,
        "layernorms": False,
        "fusion_bias": bias,
        "torch_dtype": "float32",
    }


def test_speculators_names_the_class_of_a_target_at_hand(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    write_draft(tmp_path / "draft", *a_draft(), "speculators", serving=Serving(str(tmp_path / "target")))
    settings = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert settings["speculators_config"]["verifier"]["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rope_scaling_is_spelled_as_transformers_does(tmp_path, kind):
    settings, _ = written(tmp_path / "draft", "vllm", a_draft(rope=ROPES[kind]))
    assert settings["rope_theta"] == ROPES[kind].theta
    assert settings["rope_scaling"] == {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "llama3": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "yarn": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.2,
            "original_max_position_embeddings": 128,
        },
    }[kind]  # fmt: skip


# ---- the engines' loaders, as data


def _slots(flavour, settings):
    """{(parameter, shard): shape}: what the engine's draft model allocates for these settings, without what it borrows."""
    c = settings["transformer_layer_config"] if flavour == "speculators" else settings
    width, ffn, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": ffn, "up_proj": ffn}
    # fc's bias: EAGLE's switch, never, always, speculators' switch.
    fusing = {"eagle": c.get("bias", True), "vllm": False, "sglang": True, "speculators": settings.get("fusion_bias")}
    # Attention biases. vLLM and SGLang also take "bias" for their switch.
    attention = c.get("attention_bias") or (flavour in ("vllm", "sglang") and c.get("bias"))
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") if attention else ()
    if flavour in ("eagle", "vllm") and c.get("qkv_bias"):
        biased = ("q_proj", "k_proj", "v_proj")
    if flavour == "eagle":
        assert head * c["num_attention_heads"] == width  # it divides
    fc, layer = ("fusion_fc", "transformer") if flavour == "speculators" else ("fc", "layers.0")
    slots = {f"{fc}.weight": (width, 2 * width), f"{layer}.post_attention_layernorm.weight": (width,)}
    slots |= {f"{fc}.bias": (width,)} if fusing[flavour] else {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        slots[f"{layer}.self_attn.{name}.weight"] = (width, queries) if name == "o_proj" else (outputs[name], width)
        slots |= {f"{layer}.self_attn.{name}.bias": (outputs.get(name, width),)} if name in biased else {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        slots[f"{layer}.mlp.{name}.weight"] = (width, ffn) if name == "down_proj" else (ffn, width)
    return {_destination(flavour, name): shape for name, shape in slots.items()}


# vLLM and SGLang stack these into one parameter; the first rule that matches anywhere in the name is taken.
_STACKED = [(".q_proj", ".qkv_proj", "q"), (".k_proj", ".qkv_proj", "k"), (".v_proj", ".qkv_proj", "v")]
_STACKED += [(".gate_proj", ".gate_up_proj", 0), (".up_proj", ".gate_up_proj", 1)]


def _destination(flavour, name):
    """(parameter, shard) that the engine's loader puts a tensor into."""
    if flavour in ("eagle", "speculators"):
        return name, None  # load_state_dict
    name = "model." + name
    for part, stacked, shard in _STACKED:
        if part in name:
            return name.replace(part, stacked), shard
    return name, None


@pytest.mark.parametrize("flavour, rope, bias", REPRESENTED)
def test_every_tensor_lands_and_every_parameter_is_filled(tmp_path, flavour, rope, bias):
    settings, tensors = written(tmp_path / "draft", flavour, a_draft(bias, rope=ROPES[rope]))
    landed = {_destination(flavour, name): value.shape for name, value in tensors.items()}
    assert len(landed) == len(tensors)
    assert landed == _slots(flavour, settings)


@pytest.mark.parametrize("flavour", ["eagle", "vllm"])
def test_biases_of_a_qwen2_draft_land_too(tmp_path, flavour):
    config, params = a_draft()
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, qkv_bias=True))
    params = jax.tree.map(lambda x: x + 0.5, random_draft(config))
    settings, tensors = written(tmp_path / "draft", flavour, (config, params))
    assert {_destination(flavour, name): value.shape for name, value in tensors.items()} == _slots(flavour, settings)
    config_again, params_again, _ = read_draft(tmp_path / "draft")
    assert config_again == config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, params_again))


@pytest.mark.parametrize("flavour", ["eagle", "vllm", "sglang"])
def test_engines_find_their_class(tmp_path, flavour):
    settings, _ = written(tmp_path / "draft", flavour, a_draft())
    (name,) = settings["architectures"]
    if flavour == "vllm":  # it puts the method before the name
        assert "Eagle" + name == "EagleLlamaForCausalLM"
    if flavour == "sglang":
        assert name == "LlamaForCausalLMEagle"
    if flavour == "eagle":  # its config class knows Llama's settings only
        assert settings["model_type"] == "llama"


def test_eagles_own_check_of_rope_scaling_passes(tmp_path):
    """EAGLE wants exactly two entries, spelled "type" and "factor", the factor a float above 1."""
    settings, _ = written(tmp_path / "draft", "eagle", a_draft(rope=ROPES["linear"]))
    assert settings["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert isinstance(settings["rope_scaling"]["factor"], float)


# ---- refusals


def _with_decoder(**changes):
    config = draft_config(toy_config())
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))


@pytest.mark.parametrize(
    "flavour, config, words",
    [
        *((f, _with_decoder(embedding_scale=5.6), ["embedding_scale", "5.6"]) for f in FLAVOURS),
        *((f, _with_decoder(rope=Rope(1e4, frequency_divisors=(1.0,) * 4)), ["rope", "divisors"]) for f in FLAVOURS),
        ("eagle", _with_decoder(head_dim=16), ["head_dim", "4 heads of 16", "hidden_size 32"]),
        ("eagle", _with_decoder(rope=ROPES["llama3"]), ["rope_scaling", "llama3"]),
        ("eagle", _with_decoder(rope=ROPES["yarn"]), ["rope_scaling", "yarn"]),
        ("eagle", _with_decoder(rope=Rope(1e5, "linear", factor=2.0)), ["rope_theta", "100000"]),
        ("vllm", draft_config(toy_config(), fc_bias=True), ["fc_bias", "sglang"]),
        ("vllm", _with_decoder(activation="gelu_tanh"), ["hidden_act", "gelu_pytorch_tanh"]),
        ("sglang", _with_decoder(activation="gelu_tanh"), ["hidden_act"]),
        ("sglang", _with_decoder(qkv_bias=True), ["qkv_bias", "o_proj"]),
        ("sglang", _with_decoder(rope=ROPES["yarn"]), ["attention_factor", "1.2"]),
        ("speculators", _with_decoder(qkv_bias=True), ["qkv_bias"]),
    ],
)
def test_what_a_flavour_cannot_say_is_refused_and_leaves_nothing(tmp_path, flavour, config, words):
    params = random_draft(config)
    with pytest.raises(ValueError, match=f"--flavour {flavour} cannot represent this draft") as error:
        write_draft(tmp_path / "draft", config, params, flavour, serving=SERVING)
    assert all(word in str(error.value) for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [None, "smollm2", "models/target.gguf"])
def test_speculators_needs_a_target_that_a_server_finds(tmp_path, target):
    with pytest.raises(ValueError, match="verifier.name_or_path.*--target"):
        write_draft(tmp_path / "draft", *a_draft(), "speculators", serving=Serving(target))
    write_draft(tmp_path / "draft", *a_draft(), "vllm", serving=Serving(target))


def test_values_that_do_not_fit_are_named(tmp_path):
    config, params = a_draft()
    params["layer"]["mlp"]["up_proj"]["kernel"] = params["layer"]["mlp"]["up_proj"]["kernel"].at[3, 4].set(1e5)
    with pytest.raises(ValueError, match="float16: tensor layers.0.mlp.up_proj.weight overflows.*bfloat16"):
        write_draft(tmp_path / "draft", config, params, "vllm", dtype="float16")
    write_draft(tmp_path / "draft", config, params, "vllm", dtype="bfloat16")
    params["fc"]["kernel"] = params["fc"]["kernel"].at[0, 0].set(np.nan)
    with pytest.raises(ValueError, match="tensor fc.weight is not finite"):
        write_draft(tmp_path / "other", config, params, "vllm")
    params["fc"]["kernel"] = jax.numpy.ones_like(params["fc"]["kernel"], jax.numpy.bfloat16)
    with pytest.raises(ValueError, match="--export-dtype keep: .* bfloat16 and float32"):
        write_draft(tmp_path / "other", config, params, "vllm")


def test_an_existing_directory_is_never_overwritten(tmp_path):
    _, before = written(tmp_path / "draft", "eagle", a_draft())
    with pytest.raises(FileExistsError, match="already there"):
        write_draft(tmp_path / "draft", *a_draft(), "eagle")
    assert np.array_equal(load_file(tmp_path / "draft" / "model.safetensors")["fc.weight"], before["fc.weight"])


def test_an_interrupted_export_is_replaced(tmp_path):
    (tmp_path / "draft.partial").mkdir()
    (tmp_path / "draft.partial" / "left").write_text("")
    written(tmp_path / "draft", "vllm", a_draft())
    files = list((tmp_path / "draft").iterdir())
    assert {path.name for path in files} == {"config.json", "model.safetensors", "README.md"}
    assert len({path.stat().st_mode for path in files}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


# ---- model card

REPORT = {
    "tau": 1.2941, "tau_low": 1.25, "tau_high": 1.34, "alpha": [0.25, 0.1, None], "n_prompts": 24,
    "config": {
        "target": "org/target", "temperature": 0.0, "num_draft_tokens": 3, "max_new_tokens": 48,
        "prompts": ["/home/me/p.jsonl"],
    },
}  # fmt: skip
SELECTION = {
    "metric": "flatness", "retain_ratio": 0.5, "thresholds": {"code": 0.0059, "maths": 0.0123}, "within": "source",
    "seed": 0, "kept": 107, "dropped": 2, "sha256": "ab12",
}  # fmt: skip
COMMANDS = {
    "vllm": r"vllm serve org/target --speculative-config '(.*)'",
    "sglang": r"--model-path org/target .*--speculative-draft-model-path ./draft",
    "eagle": r"base_model_path='org/target', ea_model_path='./draft'",
    "speculators": r"SpeculatorModel.from_pretrained\('./draft'\)",
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_card_tells_what_is_known(tmp_path, flavour):
    written(tmp_path / "draft", flavour, a_draft(), provenance=Provenance({"target": "f00d"}, SELECTION, (REPORT,)))
    card = (tmp_path / "draft" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "org/target"\n')
    assert "**τ = 1.294** [1.250, 1.340]" in card and "24 prompts (p.jsonl); greedy" in card and "0.250, 0.100, –" in card
    assert "within source, thresholds code 0.0059, maths 0.0123, seed 0" in card
    assert "107 conversations" in card and "`ab12`" in card and '"target": "f00d"' in card
    assert "/home" not in card
    command = re.search(COMMANDS[flavour], card, re.DOTALL)
    assert command
    if flavour == "vllm":
        assert json.loads(command[1]) == {
            "method": "eagle",
            "model": "./draft",
            "num_speculative_tokens": 3,
            "draft_sample_method": "probabilistic",
        }


def test_the_card_says_what_is_not_known(tmp_path):
    write_draft(tmp_path / "draft", *a_draft(), "vllm", serving=Serving("smollm2"))
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "Not measured yet" in card and "Not known" in card and "base_model" not in card
    assert "vllm serve TARGET " in card and "trained for smollm2" in card


# ---- a small head


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_tokens_of_a_small_head_stand_beside_what_an_engine_reads(tmp_path, flavour):
    config, params = a_draft()
    small = dataclasses.replace(config, vocabulary=(3, 5, 8, 63))
    whole = written(tmp_path / "whole", flavour, (config, params))
    settings, tensors = written(tmp_path / "small", flavour, (small, params))
    assert settings == whole[0] and all(np.array_equal(tensors[name], x) for name, x in whole[1].items())
    assert tensors.keys() == whole[1].keys()
    assert json.loads((tmp_path / "small" / "draft_vocabulary.json").read_text()) == [3, 5, 8, 63]
    assert not (tmp_path / "whole" / "draft_vocabulary.json").exists()
    assert read_draft(tmp_path / "small").config == small
    # The card says how SGLang, which alone can, proposes these tokens only.
    card = (tmp_path / "small" / "README.md").read_text()
    assert ("--speculative-token-map" in card) == (flavour == "sglang") and "4 of the 64 tokens" in card


@pytest.mark.parametrize(
    "content, message",
    [
        ("[3, 5", "draft_vocabulary.json: damaged JSON"),
        ('{"tokens": [3]}', "expected a JSON array"),
        ("[]", "empty list"),
        ("[3, true]", "entry 1 is True"),
        ("[3, 64]", "entry 1 is 64, not one of the target's 64 tokens"),
        ("[-1, 3]", "entry 0 is -1"),
        ("[3, 5, 5]", "entry 2 is 5, after 5"),
        ("[3, 2]", "entry 1 is 2, after 3"),
    ],
)
def test_a_damaged_list_of_tokens_is_named(tmp_path, content, message):
    written(tmp_path / "draft", "vllm", a_draft())
    (tmp_path / "draft" / "draft_vocabulary.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_draft(tmp_path / "draft")


def test_a_list_of_tokens_that_is_lost_or_a_pointer_is_named_and_one_of_all_is_none(tmp_path):
    config, params = a_draft()
    written(tmp_path / "draft", "vllm", (config, params))
    path = tmp_path / "draft" / "draft_vocabulary.json"
    path.write_text(json.dumps(list(range(config.decoder.vocab_size))))
    assert read_draft(tmp_path / "draft").config == config
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    with pytest.raises(ValueError, match="draft_vocabulary.json.*LFS"):
        read_draft(tmp_path / "draft")
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="draft_vocabulary.json"):
        read_draft(tmp_path / "draft")


def test_a_directory_of_the_packaged_drafts_name_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_draft("smollm2").config.decoder.hidden_size == 576
    config, params = a_draft()
    written(tmp_path / "smollm2", "vllm", (config, params))
    assert load_draft("smollm2").config == load_draft(tmp_path / "smollm2").config == config
