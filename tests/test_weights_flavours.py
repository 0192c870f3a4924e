"""EAGLE-3 drafts in six flavours: what is written is what each engine's loader looks for, and it reads back to the same bits.

The engines' rules are encoded here as data, from their sources of autumn 2026: the parameters that their draft model has for a
config.json, where a tensor of the file goes, which of the target's layers they hand over, and which switches they read.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
from eagle3_drafts import SERVING, WORDS, N, a_config, a_draft, same_params, written
from test_weights_export import REPORT, ROPES
from toy import LAYER_SETTINGS, toy_config

from jsfdd.models.architecture import Rope
from jsfdd.models.draft import draft_config
from jsfdd.weights.card import Provenance
from jsfdd.weights.eagle import read_draft
from jsfdd.weights.eagle3_settings import NORM_FLAGS
from jsfdd.weights.export import write_draft
from jsfdd.weights.flavours import check_flavour

FLAVOURS = ["vllm", "sglang", "eagle", "speculators", "tpu-inference", "sglang-jax"]


def represents(flavour, config):
    try:
        check_flavour(config, flavour, SERVING)
    except ValueError:
        return False
    return True


# ---- what each flavour can say

CASES = {
    "plain": {},
    "all tokens": {"vocabulary": ()},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "norm_before_residual": {"norm_before_residual": True},
    "3.1": {"fc_norm": True, "norm_output": True, "norm_before_residual": True},
    "other layers": {"layers": (1, 4, 6)},
    "two layers": {"layers": (0, 8)},
    "linear": {"rope": ROPES["linear"]},
    "llama3": {"rope": ROPES["llama3"]},
    "yarn": {"rope": Rope(1e6, "yarn", factor=8.0, original_max_position=128, attention_factor=None)},
    "yarn, another attention": {"rope": ROPES["yarn"]},
    "heads": {"decoder": {"head_dim": 16}},
    "gelu": {"decoder": {"activation": "gelu_tanh"}},
}
ABLE = {
    "vllm": set(CASES) - {"gelu"},
    "sglang": set(CASES) - {"gelu", "norm_before_residual", "3.1", "yarn, another attention"},
    "eagle": {"plain", "all tokens", "linear", "gelu"},
    "speculators": set(CASES) - {"gelu", "two layers"},
    "tpu-inference": {"plain", "all tokens", "norm_before_residual", "llama3", "heads", "gelu"},
    "sglang-jax": {"plain", "all tokens", "llama3", "yarn", "heads"},
}
REPRESENTED = [(flavour, case) for flavour in FLAVOURS for case in CASES if case in ABLE[flavour]]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_a_flavour_can_say(flavour):
    assert {case for case, options in CASES.items() if represents(flavour, a_config(**options))} == ABLE[flavour]


@pytest.mark.parametrize(
    "flavour, options, words",
    [
        *((f, {"fc_bias": True}, ["fc_bias"]) for f in FLAVOURS),
        *((f, {"decoder": {"qkv_bias": True}}, ["qkv_bias"]) for f in FLAVOURS),
        *((f, {"decoder": {"embedding_scale": 5.6}}, ["embedding_scale"]) for f in FLAVOURS),
        *(
            (f, {"fc_norm": True}, ["fc_norm", "use vllm, sglang, speculators"])
            for f in ("eagle", "tpu-inference", "sglang-jax")
        ),
        ("sglang", {"norm_before_residual": True}, ["norm_before_residual", "use vllm, speculators, tpu-inference"]),
        ("eagle", {"norm_output": True}, ["norm_output"]),
        *((f, {"layers": (2, 5, 6)}, ["target_layers", "[2, 5, 6]"]) for f in ("eagle", "tpu-inference", "sglang-jax")),
        ("speculators", {"layers": (1, 2)}, ["target_layers", "takes three"]),
        ("tpu-inference", {"rope": ROPES["yarn"]}, ["rope_scaling", "yarn"]),
        ("tpu-inference", {"rope": ROPES["linear"]}, ["rope_scaling", "linear"]),
        ("sglang-jax", {"rope": ROPES["yarn"]}, ["attention_factor", "1.2"]),
    ],
)
def test_what_it_cannot_is_refused_by_name_and_leaves_nothing(tmp_path, flavour, options, words):
    with pytest.raises(ValueError, match=f"--flavour {flavour} cannot represent this draft") as error:
        write_draft(tmp_path / "draft", *a_draft(**options), flavour, serving=SERVING)
    assert all(word in str(error.value) for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flavour", ["tpu-inference", "sglang-jax"])
def test_an_eagle1_draft_is_refused_where_only_eagle3_is_served(flavour):
    with pytest.raises(ValueError, match=f"--flavour {flavour} cannot .*: kind: .* EAGLE-3"):
        check_flavour(draft_config(toy_config()), flavour, SERVING)


# ---- round trip


@pytest.mark.parametrize("flavour, case", REPRESENTED)
def test_round_trip_is_exact(tmp_path, flavour, case):
    config, params = a_draft(**CASES[case])
    written(tmp_path / "draft", flavour, (config, params))
    again, params_again, _ = read_draft(tmp_path / "draft")
    if case == "yarn":  # said as the context that it extends to, and as the attention factor that this means
        assert again.decoder.max_position == 8 * 128 and again.decoder.rope.attention_factor == 0.1 * np.log(8) + 1
        decoder = dataclasses.replace(again.decoder, max_position=512, rope=config.decoder.rope)
        again = dataclasses.replace(again, decoder=decoder)
    assert again == config
    assert same_params(params, params_again)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_second_export_is_the_same_file_in_half_the_bytes_too(tmp_path, flavour):
    _, first = written(tmp_path / "a", flavour, a_draft(), dtype="bfloat16")
    _, second = written(tmp_path / "b", flavour, read_draft(tmp_path / "a")[:2])
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    assert {x.dtype.name for name, x in first.items() if name not in ("d2t", "t2d")} == {"bfloat16"}
    assert first["d2t"].dtype == np.int64  # never rounded with the rest


# ---- names, shapes, settings

_LAYER = {
    "input_layernorm.weight": (32,),
    "hidden_norm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
    "self_attn.q_proj.weight": (32, 64),
    "self_attn.k_proj.weight": (16, 64),
    "self_attn.v_proj.weight": (16, 64),
    "self_attn.o_proj.weight": (32, 32),
    "mlp.gate_proj.weight": (48, 32),
    "mlp.up_proj.weight": (48, 32),
    "mlp.down_proj.weight": (32, 48),
}
_OTHERS = {"fc.weight": (32, 96), "norm.weight": (32,), "lm_head.weight": (7, 32), "d2t": (7,), "t2d": (64,)}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_names_shapes_and_values(tmp_path, flavour):
    config, params = a_draft()
    _, tensors = written(tmp_path / "draft", flavour, (config, params))
    layer = "layers.0" if flavour == "speculators" else "midlayer"
    assert {name: x.shape for name, x in tensors.items()} == {f"{layer}.{name}": s for name, s in _LAYER.items()} | _OTHERS
    # y = W x: columns of q that come first multiply the normed embedding, those of fc the lowest layer's stream.
    assert np.array_equal(tensors[f"{layer}.self_attn.q_proj.weight"], params["layer"]["attention"]["q_proj"]["kernel"].T)
    assert np.array_equal(tensors["fc.weight"], params["fc"]["kernel"].T)
    assert np.array_equal(tensors["lm_head.weight"], params["head"]["rows"])
    assert np.array_equal(tensors[f"{layer}.input_layernorm.weight"], params["layer"]["embedding_norm"]["scale"])
    assert np.array_equal(tensors[f"{layer}.hidden_norm.weight"], params["layer"]["hidden_norm"]["scale"])
    assert (np.arange(7) + tensors["d2t"]).tolist() == list(WORDS) == np.flatnonzero(tensors["t2d"]).tolist()
    assert tensors["t2d"].dtype == bool


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_draft_of_all_tokens_has_a_map_where_the_engine_cannot_do_without(tmp_path, flavour):
    _, tensors = written(tmp_path / "draft", flavour, a_draft(vocabulary=()))
    assert tensors["lm_head.weight"].shape == (64, 32)
    if flavour in ("tpu-inference", "sglang-jax"):
        assert not tensors["d2t"].any() and tensors["d2t"].shape == (64,) and tensors["t2d"].all()
    else:
        assert not {"d2t", "t2d"} & tensors.keys()


_OFF = dict.fromkeys(("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"), False)


@pytest.mark.parametrize("flavour", ["vllm", "sglang", "eagle", "tpu-inference", "sglang-jax"])
def test_settings_of_flat_flavours(tmp_path, flavour):
    settings, _ = written(tmp_path / "draft", flavour, a_draft())
    name = "Eagle3LlamaForCausalLM" if flavour == "tpu-inference" else "LlamaForCausalLMEagle3"
    assert settings == {
        "architectures": [name],
        **LAYER_SETTINGS,
        "draft_vocab_size": 7,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 6],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 5]},
        "num_aux_hidden_states": 3,
        **_OFF,
        "bias": False,
        "torch_dtype": "float32",
    }


def test_settings_of_speculators(tmp_path):
    settings, _ = written(tmp_path / "draft", "speculators", a_draft(norm_output=True))
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    assert settings == {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": "org/target", "architectures": []},
        },
        "transformer_layer_config": LAYER_SETTINGS,
        "draft_vocab_size": 7,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 6],
        **_OFF,
        "norm_output": True,
        "torch_dtype": "float32",
    }


@pytest.mark.parametrize(
    "flavour, rope, positions", [("vllm", "yarn", 512), ("sglang", "yarn8", 1024), ("vllm", "llama3", 512)]
)
def test_a_draft_is_said_to_go_as_far_as_its_target(tmp_path, flavour, rope, positions):
    """YaRN's own context, 4 · 128, is not above what the target says; 8 · 128 is. Llama-3's files say the extended one."""
    ropes = ROPES | {"yarn8": Rope(1e6, "yarn", factor=8.0, original_max_position=128)}
    settings, _ = written(tmp_path / "draft", flavour, a_draft(rope=ropes[rope]))
    assert settings["max_position_embeddings"] == positions
    assert settings["rope_theta"] == ropes[rope].theta


# ---- the engines' loaders, as data


def _slots(flavour, settings):
    """{(parameter, shard): shape}: what the engine's draft model allocates, without what it borrows or does not need."""
    c = settings["transformer_layer_config"] if flavour == "speculators" else settings
    width, ffn, head, size = c["hidden_size"], c["intermediate_size"], c["head_dim"], settings["draft_vocab_size"]
    queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    if flavour == "eagle":
        assert queries == width and "target_hidden_size" not in c  # it divides; with the latter it would draw its embedding
    # How many states fc reads: a number, else as many as eagle_config lists, else three. speculators counts its list.
    nested = (settings.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    states = settings.get("num_aux_hidden_states") or len(nested or "xyz")
    if flavour == "speculators":
        states = len(settings["eagle_aux_hidden_state_layer_ids"])
    states = 3 if flavour in ("eagle", "tpu-inference", "sglang-jax") else states
    layer = "layers.0" if flavour == "speculators" else "midlayer"
    # "bias" is fc's and o_proj's in SGLang, fc's and all of the attention's in its JAX twin, and no file fills the latter.
    assert not c.get("attention_bias") and not c.get("bias") and not c.get("tie_word_embeddings", True)
    slots = {"fc.weight": (width, states * width), "norm.weight": (width,), "lm_head.weight": (size, width)}
    slots |= {
        f"{layer}.self_attn.{name}.weight": (n, 2 * width)
        for name, n in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
    }
    slots |= {f"{layer}.self_attn.o_proj.weight": (width, queries), f"{layer}.mlp.down_proj.weight": (width, ffn)}
    slots |= {f"{layer}.mlp.{name}.weight": (ffn, width) for name in ("gate_proj", "up_proj")}
    slots |= {f"{layer}.{name}.weight": (width,) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    if flavour in ("vllm", "sglang", "speculators"):
        slots |= {"input_norm.weight": (states * width,)} if settings["norm_before_fc"] else {}
        slots |= {f"fc_norm.{i}.weight": (width,) for i in range(states)} if settings["fc_norm"] else {}
    if flavour in ("tpu-inference", "sglang-jax") or size != c["vocab_size"]:
        slots["d2t"] = (size,)
    if flavour in ("eagle", "speculators") and size != c["vocab_size"]:
        slots["t2d"] = (c["vocab_size"],)
    return {_destination(flavour, name): shape for name, shape in slots.items()}


_STACKED = [(".q_proj", ".qkv_proj", "q"), (".k_proj", ".qkv_proj", "k"), (".v_proj", ".qkv_proj", "v")]
_STACKED += [(".gate_proj", ".gate_up_proj", 0), (".up_proj", ".gate_up_proj", 1)]


def _destination(flavour, name):
    """(parameter, shard) that the engine's loader puts a tensor into; None where it skips one."""
    if name == "t2d" and flavour not in ("eagle", "speculators"):
        return None
    if flavour in ("eagle", "speculators", "tpu-inference", "sglang-jax"):
        return name, None  # by these very names; the last two from "midlayer" only
    if name == "d2t":
        return "draft_id_to_target_id", None
    name = name.replace("midlayer.", "layers.0.")
    name = name if name.startswith("lm_head") else "model." + name
    for part, stacked, shard in _STACKED:
        if part in name:
            return name.replace(part, stacked), shard
    return name, None


def _handed_over(flavour, settings, num_layers):
    """The layers of whose inputs the engine makes the draft's states, in its order."""
    default = (2, num_layers // 2, num_layers - 3)
    if flavour in ("vllm", "speculators"):  # the set that the top level names, as the forward pass comes by
        return tuple(sorted(set(settings.get("eagle_aux_hidden_state_layer_ids") or default)))
    if flavour == "sglang":  # the outputs that eagle_config names: one layer later they are inputs
        nested = (settings.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        return tuple(i for i in range(num_layers) if i in ([n + 1 for n in nested] if nested else default))
    return default  # EAGLE and tpu-inference read no file for it, sglang-jax the target's


def _computed(flavour, settings):
    """The norms that the engine gives the draft."""
    reads = {
        "vllm": NORM_FLAGS,
        "speculators": NORM_FLAGS,  # vLLM takes norm_before_residual for true where it is not said
        "sglang": ("norm_before_fc", "fc_norm", "norm_output"),
        "tpu-inference": ("norm_before_residual",),
    }.get(flavour, ())
    return {flag: flag in reads and settings[flag] for flag in NORM_FLAGS}


@pytest.mark.parametrize("flavour, case", REPRESENTED)
def test_an_engine_finds_all_that_it_looks_for_and_overlooks_nothing(tmp_path, flavour, case):
    config, params = a_draft(**CASES[case])
    settings, tensors = written(tmp_path / "draft", flavour, (config, params))
    landed = {_destination(flavour, name): x.shape for name, x in tensors.items() if _destination(flavour, name)}
    assert landed == _slots(flavour, settings)
    assert _handed_over(flavour, settings, N) == config.target_layers
    assert _computed(flavour, settings) == {flag: getattr(config, flag) for flag in NORM_FLAGS}


# ---- model card

LINES = {
    "vllm": r"vllm serve org/target --speculative-config '(\{.*\})'",
    "sglang": r"-m sglang.launch_server --model-path org/target --speculative-algorithm EAGLE3 .*draft-model-path ./draft",
    "eagle": r"EaModel.from_pretrained\(use_eagle3=True, base_model_path='org/target', ea_model_path='./draft'\)",
    "speculators": r"\nvllm serve ./draft\n",
    "tpu-inference": r"MODEL_IMPL_TYPE=flax_nnx .*vllm serve org/target --speculative-config '(\{.*\})'",
    "sglang-jax": r"-m sgl_jax.launch_server --model-path org/target --speculative-algorithm EAGLE3 .*-num-steps 3",
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_card_has_the_line_that_serves_it_and_what_to_expect(tmp_path, flavour):
    hot = REPORT | {"tau": 1.1, "config": REPORT["config"] | {"temperature": 1.0}}
    written(tmp_path / "draft", flavour, a_draft(), provenance=Provenance(reports=(REPORT, hot)))
    card = (tmp_path / "draft" / "README.md").read_text()
    line = re.search(LINES[flavour], card, re.DOTALL)
    assert line
    if line.groups():
        speculation = json.loads(line[1])
        assert speculation.pop("method") == "eagle3" and speculation.pop("num_speculative_tokens") == 3
        assert (speculation.pop("draft_sample_method", None) == "probabilistic") == (flavour == "vllm")
    assert "**τ = 1.294**" in card and "greedy, a chain" in card
    assert "**τ = 1.100**" in card and "temperature 1, a chain" in card
    assert ("expect less" in card) == (flavour != "vllm")
    assert "enters the target's layers 2, 4, 6" in card and "7 of the 64 tokens" in card and "EAGLE-3 draft" in card
