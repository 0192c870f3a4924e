"""`plan` from shapes alone: exact where it counts, near what the compiler allocates, and useful for what is not here."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from rich.console import Console
from toy import toy_config, write_chats, write_target

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Batch, DraftBatch
from jsfdd.commands.ahead import Compiled, Program, collectives
from jsfdd.commands.cli import main
from jsfdd.commands.costs import (
    Lengths,
    Stage,
    evaluate_stage,
    forward_flops,
    layer_temporaries,
    param_bytes,
    score_stage,
    soft_targets_stage,
    train_stage,
)
from jsfdd.commands.options import from_options
from jsfdd.commands.outcome import rendered
from jsfdd.commands.plan import GB, Devices, Plan, PlanConfig, prepare, print_plan, suggest_model_shards
from jsfdd.commands.plan_compiled import print_compiled
from jsfdd.data.batches import Shape
from jsfdd.models.blocked_attention import BLOCK
from jsfdd.models.draft import draft_config
from jsfdd.models.flops import layer_matrices
from jsfdd.models.target import hidden_states, init_params
from jsfdd.scoring.score import make_score_step
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.step import init_state, make_optimizer, make_train_step

SEVENTY_B = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=8192, intermediate_size=28672,
    num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
    rms_norm_eps=1e-5, rope_theta=5e5, hidden_act="silu", tie_word_embeddings=False,
)  # fmt: skip


def options(tmp_path, **changes):
    return from_options(PlanConfig, **(dict(target="x", data=(tmp_path / "chats.jsonl",), batch_tokens=4096) | changes))


def test_a_70b_config_without_weights_or_tokenizer(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SEVENTY_B))
    write_chats(tmp_path / "chats.jsonl")
    shared = dict(target=str(tmp_path), dtype="bfloat16", devices=16)
    plan = prepare(options(tmp_path, **shared, device_kind="TPU v5"))
    score = plan.stages[0]
    assert score.memory["target"] == pytest.approx(70.55e9 * 2, rel=0.001)  # the 70B that its makers count
    assert score.peak > 95 * GB and plan.suggested == 4 and "estimated" in plan.lengths.source
    # Two FLOPs a parameter and token, attention and the padding of the tokens aside.
    assert score.flops > 2 * 68e9 * plan.lengths.tokens.sum()
    print_plan(plan, Console(highlight=False))
    out = capsys.readouterr().out
    assert "--model-shards 4" in out and "16 × TPU v5, 95 GB and 459 TFLOP/s" in out
    # The draft of such a target, its gradient and its moments are 16 GB on every device.
    assert prepare(options(tmp_path, **shared, device_kind="TPU v5 lite")).suggested is None


def test_a_mixture_of_experts_is_counted_whole_and_by_what_a_token_meets(tmp_path):
    """The sizes of Qwen3-30B-A3B, of which its makers count 30.5 and 3.3 billion parameters."""
    sizes = dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6,
        rope_theta=1e6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    write_chats(tmp_path / "chats.jsonl")
    plan = prepare(options(tmp_path, target=str(tmp_path), dtype="bfloat16", devices=8, device_kind="TPU v5"))
    assert plan.parameters == (pytest.approx(30.5e9, rel=2e-3), pytest.approx(3.3e9, rel=2e-2))
    assert plan.stages[0].memory["target"] == pytest.approx(2 * 30.5e9, rel=2e-3)
    # Two FLOPs of a token for what it meets, but for the embedding and the head, and some attention.
    assert 2 * 2.6e9 < forward_flops(plan.target, [(1, 256)]) / 256 < 2 * 3.3e9
    assert "30.5 billion parameters, of which a token meets 3.3" in rendered(lambda out: print_plan(plan, out))


def test_unknown_devices_are_refused_and_those_here_are_measured(tmp_path, capsys):
    write_target(tmp_path / "target")
    write_chats(tmp_path / "chats.jsonl")
    arguments = ["plan", "--target", str(tmp_path / "target"), "--data", str(tmp_path / "chats.jsonl")]
    arguments += ["--device-kind", "Abacus"]
    assert main(arguments) == 2
    assert "'Abacus' is unknown; choose from" in capsys.readouterr().err
    assert main([*arguments[:-2], "--json"]) == 0  # of the devices that are here
    values = json.loads(capsys.readouterr().out)
    assert values["devices"]["kind"] == "cpu" and values["devices"]["rate"] > 0
    assert [stage["name"] for stage in values["stages"]] == ["score", "hidden states", "soft targets", "train", "evaluate"]
    assert values["stages"][-1]["flops"] is None


def test_the_suggested_mesh_is_the_first_that_fits(tmp_path):
    config = toy_config(vocab_size=4096, hidden_size=64, intermediate_size=128, num_heads=8, num_kv_heads=8)
    lengths, asked = Lengths(np.full(8, 64), np.full(8, 30), ""), options(tmp_path, batch_tokens=64)

    def suggested(memory):
        return suggest_model_shards(asked, config, lengths, Devices(8, "cpu", memory, 1.0, ""))

    peaks = {m: max(
        score_stage(config, lengths, 64, 4, m, "cpu").peak,
        train_stage(config, lengths, 64, 0.5, Recipe(), 4, m, 8 // m, "cpu").peak,
        evaluate_stage(config, Recipe(), 2048 + 128, 8, 4, m, 8 // m, "cpu").peak,
    ) for m in (1, 2, 4, 8)}  # fmt: skip
    assert peaks[1] > peaks[2] > peaks[4] > peaks[8]
    for m in (1, 2, 4, 8):
        assert suggested(peaks[m] / 0.89) == m
    assert suggested(peaks[8] / 2) is None


def test_parameters_are_counted_to_the_byte():
    config = toy_config(vocab_size=96)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert param_bytes(config, 4, 1) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert param_bytes(config, 4, 2) < 0.6 * param_bytes(config, 4, 1)


# Large enough that what is allocated is arrays, not the compiler's scratch.
CHECKED = toy_config(
    vocab_size=8192, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32
)
SHAPE = Shape(8, 256)


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def allocated(compiled):
    found = compiled.memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def test_a_scoring_step_is_near_what_is_allocated():
    mesh = make_mesh(1)
    params = jax.eval_shape(lambda: init_params(CHECKED, jax.random.key(0)))
    batch = Batch(np.zeros(SHAPE, np.int32), np.zeros(SHAPE, bool), np.zeros(SHAPE.rows, np.int32))
    compiled = make_score_step(CHECKED, mesh).lower(params, shapes_of(batch)).compile()
    lengths = Lengths(np.full(8, 256), np.full(8, 100), "")
    expected = score_stage(CHECKED, lengths, 8 * 256, 4, 1, "cpu").peak
    assert 0.6 < expected / allocated(compiled) < 1.6, (expected, allocated(compiled), compiled.memory_analysis())


def test_a_training_step_is_near_what_is_allocated():
    mesh, draft = make_mesh(1), draft_config(CHECKED)
    recipe = Recipe()
    optimizer = make_optimizer(recipe, 10)
    frozen = jax.eval_shape(lambda: borrow(CHECKED, init_params(CHECKED, jax.random.key(0))))
    state = jax.eval_shape(lambda: init_state(draft, optimizer, 0))
    batch = DraftBatch(
        np.zeros(SHAPE, np.int32),
        np.zeros(SHAPE, bool),
        np.zeros(SHAPE, np.float32),
        np.zeros((*SHAPE, CHECKED.hidden_size), np.float32),
        np.zeros((*SHAPE, CHECKED.hidden_size + 1), np.float32),
    )
    compiled = make_train_step(draft, optimizer, mesh, recipe).lower(frozen, state, shapes_of(batch)).compile()
    lengths = Lengths(np.full(8, 256), np.full(8, 100), "")
    stage = train_stage(CHECKED, lengths, 8 * 256, 0.5, recipe, 4, 1, 1, "cpu")
    assert 0.6 < stage.program / allocated(compiled) < 1.6, (stage.program, allocated(compiled), compiled.memory_analysis())


def test_likeliest_tokens_take_disk_by_their_number_alone():
    lengths = Lengths(np.full(8, 256), np.full(8, 100), "")
    changes = ({}, dict(soft_targets="top_k"), dict(soft_targets="top_k", soft_top_k=256))
    means, few, many = (soft_targets_stage(CHECKED, lengths, 4096, 0.5, Recipe(**change), 4, 1, "cpu") for change in changes)
    kept = 0.5 * 8 * 256
    assert (means.disk, few.disk, many.disk) == (kept * 2 * 257, kept * (4 * 32 + 2), kept * (4 * 256 + 2))
    assert few.flops == many.flops == means.flops / 2


def test_forward_flops_are_those_of_the_matrices():
    """Against XLA's own count of one forward pass without a head; it counts the norms' and softmax's arithmetic too."""
    config = dataclasses.replace(CHECKED, num_layers=1)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    lowered = jax.jit(lambda p, t: hidden_states(config, p, t)).lower(params, jax.ShapeDtypeStruct(SHAPE, np.int32))
    counted = lowered.compile().cost_analysis()["flops"]
    assert forward_flops(config, [SHAPE]) == pytest.approx(counted, rel=0.1)


def test_attention_over_many_blocks_computes_the_pairs_that_it_visits():
    wide = dataclasses.replace(CHECKED, num_layers=1)
    sliding = dataclasses.replace(wide, family="mistral", sliding_window=BLOCK, sliding_layers=(True,))

    def pairs(config, length):
        return (forward_flops(config, [(1, length)]) / 2 - layer_matrices(config) * length) / (2 * 8 * 32)

    assert pairs(wide, BLOCK) == BLOCK**2
    assert pairs(wide, 3 * BLOCK) == 6 * BLOCK**2  # of nine pairs of blocks those on and below the diagonal
    assert pairs(sliding, 4 * BLOCK) == 7 * BLOCK**2  # a window reaches into the block before
    assert layer_temporaries(wide, Shape(1, 64 * BLOCK), 2, 1, "cpu") == pytest.approx(
        4 * layer_temporaries(wide, Shape(1, 16 * BLOCK), 2, 1, "cpu"), rel=0.1
    )


def test_compiling_needs_a_compiler_and_names_its_devices_itself(tmp_path, monkeypatch):
    write_chats(tmp_path / "chats.jsonl")
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match=r"v5p:2x2x2: compiling for TPUs needs libtpu: pip install 'jsfdd\[tpu\]'"):
        prepare(options(tmp_path, compile="v5p:2x2x2"))
    with pytest.raises(ValueError, match="--compile: names the devices itself; leave --devices"):
        options(tmp_path, compile="v5p:2x2x2", devices=4)
    monkeypatch.setitem(sys.modules, "jax_cuda13_plugin", None)
    with pytest.raises(ValueError, match=r"h200:8: compiling for GPUs needs CUDA's compiler: pip install 'jsfdd\[cuda\]'"):
        prepare(options(tmp_path, compile="h200:8"))
    with pytest.raises(ValueError, match="h200:12: write how many GPUs"):
        prepare(options(tmp_path, compile="h200:12"))


def test_what_a_compiler_said_stands_beside_the_estimates():
    mesh, shape = make_mesh(1), Shape(4, 2048)
    exchanges = collectives(
        "%a = f32[4,2]{1,0} all-reduce(%b)\n%c = (bf16[4]{0}, f32[]) all-reduce-start(%d)\n%e = f32[] add(%f)"
    )
    assert exchanges == {"all-reduce": (32 + 12, 2)}
    program = Program(16 * 10**9, 10**9, 10**8, exchanges, 3e8, 3e6, 7.0)
    compiled = [Compiled("score", shape, program), Compiled("train", shape, None, "Ran out; use --model-shards")]
    stages = [Stage(name, {"all": 2e9}, 0.0, 0.0) for name in ("score", "train")]
    plan = Plan(stages, Devices(1, "x", 1, 1, "x"), 1, 1, Lengths(np.ones(1), np.ones(1), ""), CHECKED, mesh)
    words = rendered(lambda out: print_compiled("v5e:2x4", compiled, plan, out))
    assert "score 4 × 2048 17.1 2 1 300 7 2 all-reduce" in " ".join(words.split())
    assert "train does not fit: Ran out; use --model-shards" in words
