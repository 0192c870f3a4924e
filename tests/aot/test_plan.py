"""`jsfdd plan --compile`: what the compiler says stands beside the estimates, and what does not fit is named."""

import dataclasses

from programs import TOY
from toy import write_chats, write_target

from jsfdd.commands import ahead
from jsfdd.commands.ahead import Program, compile_stage, lower_hidden, topology_mesh
from jsfdd.commands.options import from_options
from jsfdd.commands.plan import PlanConfig, prepare, run
from jsfdd.data.batches import Shape


def test_every_stage_is_lowered_and_the_first_two_compiled(tmp_path, monkeypatch):
    """`test_aot.py` compiles programs that train and decode; here they only come as far as the compiler."""
    write_chats(tmp_path / "chats.jsonl")
    target = write_target(tmp_path / "target")
    options = dict(target=str(target), data=(tmp_path / "chats.jsonl",), compile="v5e:2x4", max_length=256, max_new_tokens=16)
    read_program, exchanges = ahead.read_program, {"all-reduce": (4, 1)}
    lowered = []

    def read_two(program, rounds):
        lowered.append(program.as_text())
        return read_program(program, rounds) if len(lowered) <= 2 else Program(1, 1, 1, exchanges, 1.0, 1.0, 1.0)

    monkeypatch.setattr(ahead, "read_program", read_two)
    config = from_options(PlanConfig, **options)
    plan = prepare(config)
    assert (plan.devices.count, plan.devices.kind) == (8, "TPU v5 lite")
    outcome = run(config, plan)
    stages = {stage["name"]: stage["program"] for stage in outcome.values["compiled"]}
    assert list(stages) == ["score", "hidden states", "train", "evaluate"]
    assert all(program["arguments"] > 0 and program["cycles"] > 0 and program["seconds"] > 0 for program in stages.values())
    assert [bool(program["collectives"]) for program in stages.values()] == [False, False, True, True]
    assert "stablehlo.while" in lowered[3] and "tf.aliasing_output" in lowered[2]  # the state is given away
    assert "compiled for v5e:2x4, 8 devices" in outcome.words and "1 all-reduce" in outcome.words


def test_what_does_not_fit_names_the_array_and_the_remedy():
    """An embedding of 17 GB, on devices of 16."""
    config = dataclasses.replace(TOY, vocab_size=1 << 25, num_layers=1, tie_embeddings=True)
    mesh, shape = topology_mesh("v5e:2x4"), Shape(1, 256)
    found = compile_stage("hidden states", shape, lambda: lower_hidden(config, mesh, shape))
    assert found.program is None
    assert "15.75G" in found.refused and "--model-shards" in found.refused
