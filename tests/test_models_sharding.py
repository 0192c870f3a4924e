"""A target in shares: every parameter has a rule, shares are read as they lie, and no host holds more than its own."""

import json
from pathlib import Path

import gguf_files
import jax
import numpy as np
import pytest
from children import Child, finish, free_port
from gguf import GGMLQuantizationType
from jax.sharding import PartitionSpec as P
from load_a_share import load_a_share
from safetensors.numpy import save_file

from jsfdd.base.mesh import make_mesh
from jsfdd.models.sharding import param_sharding, place_params, shard_shape
from jsfdd.weights import gguf, huggingface
from jsfdd.weights.gguf_file import read_header
from jsfdd.weights.layout import stored_shapes

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "qwen3_moe"])
def test_shares_are_what_the_whole_is_cut_into(family):
    """Read in shares, the arrays are the whole ones' to the bit, and every matrix is really split."""
    config = huggingface.read_config(GOLDEN / family)
    whole = huggingface.read_params(GOLDEN / family, config)
    mesh = make_mesh(2, 2)
    shares = huggingface.read_params(GOLDEN / family, config, mesh=mesh)
    assert jax.tree.structure(shares) == jax.tree.structure(whole)

    def check(path, share, expected):
        np.testing.assert_array_equal(share, expected, err_msg=str(path))
        split = share.sharding.shard_shape(share.shape) != share.shape
        assert split == (path[-1].key in ("kernel", "embedding", "bias") and path[-2].key != "router"), path

    jax.tree_util.tree_map_with_path(check, shares, whole)
    jax.tree.map(np.testing.assert_array_equal, place_params(whole, mesh), whole)


def test_shares_of_a_gguf_file(tmp_path):
    """Blocks of quantised numbers included, and rows of heads that llama.cpp interleaves."""
    config = huggingface.read_config(GOLDEN / "llama")
    kinds = {f"blk.{layer}.attn_q.weight": GGMLQuantizationType.Q8_0 for layer in range(config.num_layers)}
    file = read_header(gguf_files.write_model(tmp_path / "model.gguf", "llama", GOLDEN / "llama", config, kinds))
    shares, whole = gguf.read_params(file, config, mesh=make_mesh(1, 2)), gguf.read_params(file, config)
    assert shares["layers"]["attention"]["q_proj"]["kernel"].sharding.spec == P(None, None, "model")
    jax.tree.map(np.testing.assert_array_equal, shares, whole)


def test_every_parameter_of_every_family_has_a_rule():
    for family in ("llama", "qwen2", "qwen3", "gemma3", "mistral", "qwen3_moe"):
        for name, shape in stored_shapes(huggingface.read_config(GOLDEN / family)).items():
            shard_shape(name, (8, 8, *shape), 1)
    with pytest.raises(ValueError, match=r"layers/mlp/shared/kernel \[2, 4, 8\]: no rule"):
        shard_shape("layers/mlp/shared/kernel", (2, 4, 8), 1)


def test_a_split_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="--model-shards: 4 does not divide the 258 of parameter embed/embedding"):
        param_sharding("embed/embedding", (258, 32), make_mesh(1, 4))


def write_large_target(directory: Path) -> None:
    """A llama of 268 MB in float32, in two files."""
    layers, width, ffn, vocab = 16, 512, 2048, 1024
    settings = dict(
        model_type="llama", vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=1e4,
        hidden_act="silu", tie_word_embeddings=True,
    )  # fmt: skip
    (directory / "config.json").write_text(json.dumps(settings))
    block = np.random.default_rng(0).random((ffn, width), np.float32)
    where = {}
    for half in range(2):
        tensors = {} if half else {"model.embed_tokens.weight": block[:vocab], "model.norm.weight": block[0]}
        for i in range(half * layers // 2, (half + 1) * layers // 2):
            name = f"model.layers.{i}"
            tensors |= {f"{name}.{norm}.weight": block[0] for norm in ("input_layernorm", "post_attention_layernorm")}
            tensors |= {f"{name}.self_attn.{part}_proj.weight": block[:width] for part in "qkvo"}
            tensors |= {f"{name}.mlp.{part}_proj.weight": block for part in ("gate", "up")}
            tensors[f"{name}.mlp.down_proj.weight"] = block.reshape(width, ffn)
        file = f"model-{half}.safetensors"
        save_file(tensors, directory / file)
        where |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.slow
def test_a_host_takes_its_share_of_memory_and_one_leaf_more_at_most(tmp_path):
    """Two processes of one device each, the model split between them: the peak while loading."""
    write_large_target(tmp_path)
    coordinator = f"127.0.0.1:{free_port()}"
    for code, out, errors in finish([Child(load_a_share, tmp_path, coordinator, i, devices=1) for i in range(2)]):
        assert code == 0, errors[-2000:]
        figures = json.loads(out.splitlines()[-1])
        assert 133e6 < figures["share"] < 137e6
        largest_leaf = 16 * 2048 * 512 * 4 // 2  # this process's half of all gate projections
        assert 0.9 * figures["share"] < figures["growth"] <= figures["share"] + largest_leaf, figures
