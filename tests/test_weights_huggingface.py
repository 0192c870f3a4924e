"""Hugging Face directories: configs old and new, strict tensors, and errors that name file, tensor and remedy."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jsfdd.models.architecture import Rope
from jsfdd.weights import huggingface

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def copy(tmp_path):
    """copy(family, **changes): a golden model's directory with changed config fields; None removes one."""

    def make(family: str, **changes) -> Path:
        directory = tmp_path / family
        shutil.copytree(GOLDEN / family, directory, dirs_exist_ok=True)
        path = directory / "config.json"
        raw = json.loads(path.read_text()) | changes
        removed = {key for key, value in changes.items() if value is None}
        path.write_text(json.dumps({key: value for key, value in raw.items() if key not in removed}))
        return directory

    return make


def edit_tensors(directory: Path, edit) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def read(directory: Path, dtype=np.float32):
    return huggingface.read_params(directory, huggingface.read_config(directory), dtype)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))


# ---- config.json


def test_old_and_new_rope_settings_agree(copy):
    new = huggingface.read_config(GOLDEN / "llama")
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    assert new.rope == Rope(10_000.0, "llama3", 8.0, 1.0, 4.0, 64)
    for key in ("rope_type", "type"):
        old = copy("llama", rope_parameters=None, rope_theta=10_000.0, rope_scaling=scaling | {key: "llama3"})
        assert huggingface.read_config(old) == new
    plain = copy("llama", rope_parameters=None, rope_theta=500_000, rope_scaling=None)
    assert huggingface.read_config(plain).rope == Rope(500_000)


def test_old_and_new_gemma_settings_agree(copy):
    new = huggingface.read_config(GOLDEN / "gemma3")
    assert new.rope == Rope(100_000.0, "linear", 2.0) and new.local_rope == Rope(1_000.0)
    assert new.sliding_layers == (True, True, False, True) and new.query_scale == 24**-0.5
    old = copy(
        "gemma3",
        rope_parameters=None,
        rope_theta=100_000.0,
        rope_local_base_freq=1_000.0,
        rope_scaling=dict(rope_type="linear", factor=2.0),
        layer_types=None,
        _sliding_window_pattern=None,
        sliding_window_pattern=3,
        tie_word_embeddings=None,
    )
    assert huggingface.read_config(old) == new


def test_gemma_ropes_in_the_old_spelling(copy):
    """A rope's "type" counts as its rope_type, also where there is one each for full and for sliding layers."""
    new = huggingface.read_config(GOLDEN / "gemma3")
    old = dict(type="linear", factor=2.0)
    flat = copy("gemma3", rope_parameters=None, rope_theta=100_000.0, rope_local_base_freq=1_000.0, rope_scaling=old)
    assert huggingface.read_config(flat) == new
    both = dict(full_attention=old | dict(rope_theta=100_000.0), sliding_attention=dict(rope_theta=1_000.0))
    assert huggingface.read_config(copy("gemma3", rope_parameters=both, rope_scaling=None)) == new
    with pytest.raises(ValueError, match="rope_parameters.rope_type is 'linear', not an object"):
        huggingface.read_config(copy("gemma3", rope_parameters=dict(rope_type="linear", factor=2.0)))


def test_null_is_what_a_file_leaves_out(copy):
    directory = copy("qwen3")
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    expected = huggingface.read_config(copy("qwen3", head_dim=None))
    path.write_text(json.dumps(raw | {"head_dim": None}))
    assert huggingface.read_config(directory) == expected and expected.head_dim == 128


def test_yarn_attention_factor(copy):
    assert huggingface.read_config(GOLDEN / "qwen3").rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    yarn = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=64)
    scaled = copy("qwen3", rope_parameters=yarn | dict(mscale=1.0, mscale_all_dim=0.5))
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert huggingface.read_config(scaled).rope.attention_factor == pytest.approx(expected)
    stated = copy("qwen3", rope_parameters=yarn | dict(attention_factor=0.7))
    assert huggingface.read_config(stated).rope.attention_factor == 0.7


def test_what_families_leave_out(copy):
    """Fields that real files omit take the family's default; the ones a tiny Gemma leaves out are the wrapper's."""
    llama = huggingface.read_config(copy("llama", num_key_value_heads=None, head_dim=None, rms_norm_eps=None))
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps, llama.tie_embeddings) == (4, 8, 1e-6, False)
    text = dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34)
    text |= dict(rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024)
    directory = copy("gemma3")
    (directory / "config.json").write_text(json.dumps(dict(model_type="gemma3", text_config=text)))
    gemma = huggingface.read_config(directory)
    assert (gemma.vocab_size, gemma.num_heads, gemma.num_kv_heads, gemma.head_dim) == (262_208, 8, 4, 256)
    assert gemma.rope == Rope(1e6, "linear", 8.0) and gemma.local_rope == Rope(1e4)
    assert gemma.tie_embeddings and gemma.query_scale == 1 / 16 and sum(gemma.sliding_layers) == 29


SLIDING = dict(use_sliding_window=True, sliding_window=4)


@pytest.mark.parametrize(
    "family, changes, window, slides",
    [
        ("mistral", {}, 6, (True,) * 3),
        ("mistral", dict(sliding_window="null"), None, ()),
        ("qwen2", dict(sliding_window=4, layer_types=None, max_window_layers=1), None, ()),
        ("qwen2", SLIDING | dict(layer_types=None, max_window_layers=1), 4, (False, True)),
        ("qwen3", SLIDING | dict(layer_types=["sliding_attention", "full_attention"]), 4, (True, False)),
    ],
)
def test_sliding_windows(copy, family, changes, window, slides):
    directory = copy(family, **changes)
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"null"', "null"))
    config = huggingface.read_config(directory)
    assert (config.sliding_window, config.sliding_layers) == (window, slides)


@pytest.mark.parametrize(
    "family, changes, message",
    [
        (
            "llama",
            dict(model_type="mamba"),
            "'mamba'; supported are llama, qwen2, qwen3, mistral, gemma3_text, qwen3_moe, mixtral",
        ),
        ("llama", dict(model_type="qwen2_moe"), "'qwen2_moe'; supported are"),  # experts that all tokens read
        ("qwen3_moe", dict(num_experts_per_tok=7), "num_experts_per_tok=7 is more than num_experts=6"),
        ("qwen3_moe", dict(num_experts_per_tok=None), "num_experts_per_tok is missing"),
        ("qwen3_moe", dict(mlp_only_layers=[0]), r"mlp_only_layers is \[0\], which jsfdd does not compute"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step is 2, which jsfdd does not compute"),
        ("mixtral", dict(num_local_experts=-4), "num_local_experts is -4"),
        ("llama", dict(hidden_act="relu"), "hidden_act is 'relu'; supported are silu"),
        ("llama", dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        ("llama", dict(attention_bias=True), "attention_bias is True"),
        ("llama", dict(mlp_bias=True), "mlp_bias is True"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        ("llama", dict(rope_parameters={"rope_type": "longrope"}), "'longrope'; supported are default, linear,"),
        ("llama", dict(rope_parameters={"rope_type": "linear"}), "linear.*factor"),
        (
            "llama",
            dict(rope_parameters={"rope_type": "linear", "factor": 2, "foo": 1}),
            "parameters.foo is not a setting",
        ),
        ("qwen3", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "truncate": False}), "truncate is False"),
        ("llama", dict(hidden_size=None), "hidden_size is missing"),
        ("llama", dict(hidden_size="32"), "hidden_size is '32'"),
        ("llama", dict(vocab_size=-1), "vocab_size is -1"),
        ("llama", dict(rms_norm_eps=10**400), "rms_norm_eps"),
        ("llama", dict(rms_norm_eps=math.nan), "rms_norm_eps is nan"),
        ("llama", dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        ("llama", dict(num_key_value_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("llama", dict(head_dim=15), "head_dim.*15"),
        ("llama", dict(tie_word_embeddings="yes"), "tie_word_embeddings.*yes"),
        ("gemma3", dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
        ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("gemma3", dict(layer_types=["full_attention"]), "layer_types"),
    ],
)
def test_unsupported_configs(copy, family, changes, message):
    directory = copy(family, **changes)
    with pytest.raises(ValueError, match=message) as error:
        huggingface.read_config(directory)
    assert str(directory / "config.json") in str(error.value)


def test_config_that_is_no_json(copy, tmp_path):
    directory = copy("llama")
    for text in ('{"model_type": ', "[]", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"):
        (directory / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json: (damaged JSON|expected a JSON object)"):
            huggingface.read_config(directory)
    with pytest.raises(FileNotFoundError, match="Hugging Face model directory"):
        huggingface.read_config(tmp_path / "absent")


# ---- tensors


def test_half_precision_sources_and_targets(copy):
    directory = copy("llama")
    original = read(directory)

    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16 if "mlp" in name else ml_dtypes.bfloat16)

    edit_tensors(directory, halve)
    stored = load_file(directory / "model.safetensors")
    got = read(directory)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got))
    expected = stored["model.layers.1.self_attn.q_proj.weight"].astype(np.float32).T
    assert np.array_equal(got["layers"]["attention"]["q_proj"]["kernel"][1], expected)
    half = read(copy("llama"), ml_dtypes.bfloat16)
    assert half["head"]["kernel"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(half["head"]["kernel"], original["head"]["kernel"].astype(ml_dtypes.bfloat16))
    assert half["norm"]["scale"].dtype == np.float32  # norms keep their bits


def test_kernels_are_transposed_across_copy_blocks():
    """A kernel wider than the block in which it is copied arrives whole."""
    from jsfdd.weights.layout import _store_transposed

    tensor = np.arange(150 * 70, dtype=np.float32).reshape(150, 70)
    target = np.zeros((70, 150), np.float32)
    _store_transposed(target, tensor)
    assert np.array_equal(target, tensor.T)


def test_missing_tensor(copy):
    directory = copy("llama")
    edit_tensors(directory, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.up_proj.weight \[48, 32\] is missing"):
        read(directory)


def test_unknown_tensor(copy):
    directory = copy("llama")
    edit_tensors(directory, lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.ones(32, np.float32)}))
    with pytest.raises(ValueError, match=r"model.safetensors: unknown tensor .*o_proj.bias \[32\]"):
        read(directory)


def test_misshapen_tensor(copy):
    directory = copy("llama")
    edit_tensors(directory, lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}))
    message = r"model.safetensors: tensor model.norm.weight has shape \[31\], the config says \[32\]"
    with pytest.raises(ValueError, match=message):
        read(directory)


def test_transposed_tensor_is_misshapen(copy):
    directory = copy("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(directory, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    with pytest.raises(ValueError, match=r"down_proj.weight has shape \[48, 32\], the config says \[32, 48\]"):
        read(directory)


def test_integer_tensor(copy):
    directory = copy("llama")
    edit_tensors(directory, lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}))
    with pytest.raises(ValueError, match="model.norm.weight has type I8; supported are F32, F16, BF16"):
        read(directory)


def test_rotary_buffers_are_known_and_ignorable(copy):
    directory = copy("llama")
    expected = read(directory)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(directory, lambda t: t.update({name: np.ones(8, np.float32)}))
    assert_same(read(directory), expected)


def test_tied_head_may_be_stored(copy):
    directory = copy("qwen2")
    expected = read(directory)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": np.zeros((128, 32), np.float32)}))
    assert_same(read(directory), expected)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": np.zeros((64, 32), np.float32)}))
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[64, 32\].*\[128, 32\]"):
        read(directory)


@pytest.mark.parametrize(
    "prefix, head",
    [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")],
)
def test_gemma_inside_an_image_model(copy, prefix, head):
    directory = copy("gemma3")
    expected = read(directory)
    config = json.loads((directory / "config.json").read_text())

    def wrap(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors[head + "weight"] = np.zeros((128, 32), np.float32)
        tensors["vision_tower.vision_model.post_layernorm.weight"] = np.ones(3, np.float32)
        tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(3, np.float32)

    edit_tensors(directory, wrap)
    (directory / "config.json").write_text(json.dumps(dict(model_type="gemma3", text_config=config, vision_config={})))
    assert_same(read(directory), expected)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize("family, kind, nested", [("qwen2", "qwen2_5_vl", False), ("qwen3", "qwen3_vl", True)])
def test_qwen_inside_an_image_model(copy, family, kind, nested, prefix):
    """Settings inside or, as in older files, outside; ropes of three coordinates, which of text are one."""
    directory = copy(family, rope_parameters=None, rope_theta=5e5)
    expected, params = huggingface.read_config(directory), read(directory)
    shards = list(directory.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for file in (*shards, directory / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    save_file(renamed | {"visual.merger.ln_q.weight": np.ones(3, np.float32)}, directory / "model.safetensors")
    text = json.loads((directory / "config.json").read_text()) | {"model_type": f"{kind}_text"}
    text |= dict(rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]))
    outside = dict(vision_config={}, tie_word_embeddings=text["tie_word_embeddings"])
    outside |= dict(text_config=text) if nested else text
    (directory / "config.json").write_text(json.dumps(outside | dict(model_type=kind)))
    assert huggingface.read_config(directory) == expected
    assert_same(read(directory), params)


def test_image_models_with_another_decoder(copy):
    directory = copy("llama", model_type="mistral3", text_config={"model_type": "qwen3_next"})
    with pytest.raises(ValueError, match="text_config.model_type is 'qwen3_next'; supported are llama"):
        huggingface.read_config(directory)
    with pytest.raises(ValueError, match="model_type is 'qwen3_vl_moe'; supported are"):
        huggingface.read_config(copy("llama", model_type="qwen3_vl_moe", text_config={}))


def test_missing_and_unknown_experts(copy):
    directory = copy("qwen3_moe")
    edit_tensors(directory, lambda t: t.pop("model.layers.1.mlp.experts.4.up_proj.weight"))
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.experts.4.up_proj.weight \[20, 32\] is missing"):
        read(directory)
    directory, shared = copy("mixtral"), "model.layers.0.block_sparse_moe.shared_expert.w1.weight"
    edit_tensors(directory, lambda t: t.update({shared: np.ones((48, 32), np.float32)}))
    with pytest.raises(ValueError, match=f"unknown tensor {shared}"):
        read(directory)


def test_one_file_equals_shards(copy):
    directory = copy("qwen3")
    expected = read(directory)
    first, second = directory.glob("model-*.safetensors")
    merged = load_file(first) | load_file(second)
    for file in (first, second, directory / "model.safetensors.index.json"):
        file.unlink()
    save_file(merged, directory / "model.safetensors")
    assert_same(read(directory), expected)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x.bin", 3]
)
def test_shard_outside_the_directory(copy, shard):
    directory = copy("qwen3")
    index = directory / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(raw))
    (directory.parent / "secret.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="index.json: tensor model.norm.weight is said to be in"):
        read(directory)


def test_index_and_shards_disagree(copy):
    directory = copy("qwen3")
    first, second = sorted(directory.glob("model-*.safetensors"))
    kept = load_file(second)
    save_file(kept | {"model.embed_tokens.weight": np.zeros((128, 32), np.float32)}, second)
    with pytest.raises(ValueError, match="tensor model.embed_tokens.weight is in .*00001.* too"):
        read(directory)
    save_file({name: tensor for name, tensor in kept.items() if name != "model.norm.weight"}, second)
    with pytest.raises(ValueError, match=f"{second.name}: tensor model.norm.weight is missing"):
        read(directory)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {second.name}"):
        read(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        read(directory)


def test_pickled_weights_are_not_read(copy):
    directory = copy("llama")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.*save_pretrained"):
        read(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        read(directory)


def test_what_is_no_model_is_said_in_a_line(copy):
    directory = copy("llama")
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match=r"index\.json: not there, but 1 shards of a model are .*download it too"):
        read(directory)
    (directory / "model-00001-of-00002.safetensors").unlink()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (directory / "model.safetensors").write_bytes(pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors: a Git LFS pointer.*git lfs pull"):
        read(directory)
    (directory / "model.safetensors").write_bytes(weights)
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_bytes(pointer)
    with pytest.raises(ValueError, match=r"config\.json: a Git LFS pointer"):
        huggingface.read_config(directory)
    layers = [f"model.layers.{i}.mlp.gate" for i in range(90)]
    for quantised, words in (
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": layers},
            r"compressed-tensors \(pack-quantized\).*; give the original model",
        ),
        ({"quant_method": "gptq", "bits": 4}, r"gptq \(4 bits\).*its FP8 version"),
        ({"quant_method": "awq", "bits": 4}, r"awq \(4 bits\).*its FP8 version"),
        ({"load_in_4bit": True}, "an unnamed method.*; give the original model"),
    ):
        (directory / "config.json").write_text(json.dumps(json.loads(config) | {"quantization_config": quantised}))
        with pytest.raises(ValueError, match=words) as error:
            huggingface.read_config(directory)
        assert len(str(error.value)) < 400 and "layers" not in str(error.value)
    (directory / "config.json").write_text(json.dumps(json.loads(config) | {"quantization_config": {}}))
    huggingface.read_config(directory)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    an_adapter = pytest.raises(FileNotFoundError, match=r"adapter_config\.json: an adapter \(LoRA\).*merge_and_unload")
    with an_adapter:
        huggingface.weight_files(directory)
    (directory / "config.json").unlink()
    with an_adapter:
        huggingface.read_config(directory)


def test_truncated_safetensors(copy):
    directory = copy("llama")
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 7, 100, 3000, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a whole safetensors file") as error:
            read(directory)
        assert str(path) in str(error.value)
    path.write_bytes((2**62).to_bytes(8, "little") + whole[8:])  # a header length that no file can have
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read(directory)


def test_a_lying_config_takes_no_memory(copy):
    """Shapes are compared before anything is allocated: this one would be a petabyte."""
    directory = copy("llama")
    config = dataclasses.replace(huggingface.read_config(directory), vocab_size=2**31 - 1, hidden_size=2**16)
    with pytest.raises(ValueError, match="has shape"):
        huggingface.read_params(directory, config)
