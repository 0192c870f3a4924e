"""`jsfdd plan --compile`: what the compiler says stands beside the estimates, and what does not fit is named."""

import dataclasses

from programs import TOY
from toy import write_chats, write_target

from jsfdd.commands.ahead import compile_stage, lower_hidden, topology_mesh
from jsfdd.commands.options import from_options
from jsfdd.commands.plan import PlanConfig, prepare, run
from jsfdd.data.batches import Shape


def test_every_stage_is_compiled(tmp_path):
    write_chats(tmp_path / "chats.jsonl")
    target = write_target(tmp_path / "target")
    options = dict(target=str(target), data=(tmp_path / "chats.jsonl",), compile="v5e:2x4", max_length=256, max_new_tokens=16)
    config = from_options(PlanConfig, **options)
    plan = prepare(config)
    assert (plan.devices.count, plan.devices.kind) == (8, "TPU v5 lite")
    outcome = run(config, plan)
    stages = {stage["name"]: stage["program"] for stage in outcome.values["compiled"]}
    assert stages.keys() == {"score", "hidden states", "train", "evaluate"}
    assert [name for name, program in stages.items() if program["collectives"]] == ["train"]
    assert all(program["arguments"] > 0 and program["seconds"] > 0 for program in stages.values())
    assert "compiled for v5e:2x4, 8 devices" in outcome.words and "1 all-reduce" in outcome.words


def test_what_does_not_fit_names_the_array_and_the_remedy():
    """An embedding of 17 GB, on devices of 16."""
    config = dataclasses.replace(TOY, vocab_size=1 << 25, num_layers=1, tie_embeddings=True)
    mesh, shape = topology_mesh("v5e:2x4"), Shape(1, 256)
    found = compile_stage("hidden states", shape, lambda: lower_hidden(config, mesh, shape))
    assert found.program is None
    assert "15.75G" in found.refused and "--model-shards" in found.refused
