"""FP8 checkpoints: numbers times scales, against the same in NumPy; what has no scales or others is refused."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jsfdd.weights import fp8, huggingface, huggingface_config, layout

GOLDEN = Path(__file__).parent / "golden"
QWEN = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [10, 12]}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True}
GATE = "model.layers.1.mlp.gate_proj.weight"  # [48, 32]


def compressed(**changes):
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | changes}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


def save(path, tensors):
    """The format by its definition: the safetensors package saves no FP8 numbers of NumPy."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = {"float32": "F32", "float8_e4m3fn": "F8_E4M3"}
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def quantised(tmp_path):
    """quantised(config, scales_of, **more): a golden model with all its layers' matrices in FP8; (directory, its tensors)."""

    def make(config, ending, scales_of, **more):
        directory = tmp_path / "model"
        shutil.copytree(GOLDEN / "llama", directory, dirs_exist_ok=True)
        raw = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
        tensors = {}
        for name, tensor in load_file(GOLDEN / "llama" / "model.safetensors").items():
            if "_proj" in name:
                tensors[name] = (tensor * 100).astype(ml_dtypes.float8_e4m3fn)
                tensors[name + ending] = np.asarray(scales_of(tensor.shape), np.float32)
            else:
                tensors[name] = tensor
        save(directory / "model.safetensors", tensors | more)
        return directory, tensors

    return make


def drawn(shape):
    return np.random.default_rng(0).uniform(0.005, 0.02, shape)


def blocks(shape):
    return drawn((-(-shape[0] // 10), -(-shape[1] // 12)))


@pytest.mark.parametrize(
    "config, ending, scales_of",
    [
        (QWEN, "_scale_inv", blocks),
        (QWEN | {"weight_block_size": None}, "_scale_inv", lambda shape: drawn(())),
        (compressed(strategy="channel"), "_scale", lambda shape: drawn((shape[0], 1))),
        (compressed(strategy="tensor"), "_scale", lambda shape: drawn((1,))),
        (compressed(strategy="block", block_structure=[10, 12]), "_scale", blocks),
    ],
)
def test_numbers_times_scales(quantised, monkeypatch, config, ending, scales_of):
    """Scales that end in no whole block, read in pieces that begin within one; activations' scales are left out."""
    monkeypatch.setattr(layout, "_PIECE", 1)
    monkeypatch.setattr(layout, "_BLOCK", 7)
    more = {GATE.removesuffix("weight") + "input_scale": np.ones(1, np.float32)}
    directory, tensors = quantised(config, ending, scales_of, **more)
    params = huggingface.read_params(directory, huggingface.read_config(directory))
    numbers, scales = tensors[GATE].astype(np.float32), tensors[GATE + ending]
    expected = np.empty((48, 32), np.float32)
    for o, i in np.ndindex(48, 32):
        if scales.size == 1:
            expected[o, i] = numbers[o, i] * scales.item()
        elif scales.shape[1] == 1:
            expected[o, i] = numbers[o, i] * scales[o, 0]
        else:
            expected[o, i] = numbers[o, i] * scales[o // 10, i // 12]
    np.testing.assert_array_equal(params["layers"]["mlp"]["gate_proj"]["kernel"][1], expected.T)
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])


def test_scales_of_another_shape_and_numbers_without(quantised):
    directory, _ = quantised(QWEN, "_scale_inv", lambda shape: drawn((2, 3)))
    with pytest.raises(ValueError, match=r"scales of .* have shape \[2, 3\]; one for each block of \[10, 12\] would be"):
        huggingface.read_params(directory, huggingface.read_config(directory))
    directory, tensors = quantised(QWEN, "_scale_inv", blocks)
    save(directory / "model.safetensors", {name: t for name, t in tensors.items() if name != GATE + "_scale_inv"})
    with pytest.raises(ValueError, match=f"model.safetensors: tensor {GATE} has type F8_E4M3 and no {GATE}_scale_inv"):
        huggingface.read_params(directory, huggingface.read_config(directory))


def test_scales_of_nothing_are_unknown(quantised):
    directory, _ = quantised(QWEN, "_scale_inv", blocks, **{"model.norm.weight_scale_inv": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match="unknown tensor model.norm.weight_scale_inv"):
        huggingface.read_params(directory, huggingface.read_config(directory))


@pytest.mark.parametrize(
    "config",
    [
        QWEN | {"fmt": "e5m2"},
        compressed(num_bits=4),
        compressed(type="int"),
        compressed(symmetric=False),
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": 3},
        {"quant_method": ["fp8"]},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": "x"}}},
    ],
)
def test_other_numbers_are_refused(config):
    assert "which jsfdd does not read; give the original model" in fp8.refusal(config)


@pytest.mark.parametrize("block", [5, True, "ab", [1], [0, 4], [True, True], ["a", "b"], {"a": 1}])
def test_a_block_that_is_none_is_refused(block):
    for config in (QWEN | {"weight_block_size": block}, compressed(block_structure=block)):
        assert "not two positive whole numbers" in fp8.refusal(config)


def test_a_text_config_that_is_no_object_is_not_asked_for_blocks(quantised):
    directory, _ = quantised(QWEN, "_scale_inv", blocks)
    for text_config in ("x", 3, {"quantization_config": "x"}):
        raw = json.loads((directory / "config.json").read_text()) | {"text_config": text_config, "quantization_config": {}}
        (directory / "config.json").write_text(json.dumps(raw))
        assert huggingface_config.quantised_block(directory) is None
