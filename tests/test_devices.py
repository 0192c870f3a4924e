"""Nothing depends on how many devices there are: meshes of 8 forced CPU devices against one, and what their programs say.

The devices are in a process of its own (on_eight_devices.py), which computes; here is only compared.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
_COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
_GROUPS = re.compile(
    r"replica_groups=(?:(?P<listed>\{\{[\d,{}]+\}\})|\[(?P<shape>[\d,]+)\]<=\[(?P<over>[\d,]+)\](?:T\((?P<turned>[\d,]+)\))?)"
)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """(arrays by name, what the programs say)."""
    out = tmp_path_factory.mktemp("eight")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "JAX_NUM_CPU_DEVICES": "8",
    }
    done = subprocess.run(
        [sys.executable, HERE / "on_eight_devices.py", out], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out / "results.npz")), json.loads((out / "programs.json").read_text())


def of(arrays, prefix):
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def test_scores_are_the_same_bits_on_one_device_and_on_eight(eight):
    one, many = (of(eight[0], f"score {mesh} ") for mesh in ("1x1", "8x1"))
    assert one["token_flatness"].max() > 0.1 and set(one) == set(many)
    for name in one:
        np.testing.assert_array_equal(many[name], one[name], err_msg=name)


def test_a_model_axis_changes_scores_by_rounding_alone(eight):
    one, many = (of(eight[0], f"score {name} ") for name in ("1x1", "4x2"))
    for name in one:
        # Sums over the vocabulary and over widths are in another order: float32's 6e-8 through two layers.
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=2e-6, err_msg=name)


def test_target_means_are_the_same_and_a_model_axis_changes_them_by_rounding_alone(eight):
    one = eight[0]["means 1x1"]
    np.testing.assert_array_equal(eight[0]["means 8x1"], one)
    np.testing.assert_allclose(eight[0]["means 2x4"], one, rtol=1e-5, atol=1e-5)
    assert np.abs(one).max() > 0.1


@pytest.mark.parametrize("mesh", ["8x1", "sharded", "moved"])
def test_the_trained_draft_is_the_same(eight, mesh):
    """`sharded` is 8x1 with Adam's moments in parts; `moved` was saved by Orbax half-way on 8x1 and went on so on 2x4."""
    one, many = (of(eight[0], f"train {name} ") for name in ("1x1", mesh))
    assert eight[0]["saved"].tolist() == [3] and len(one) > 5
    for name in one:
        # Adam turns rounding in a gradient that is all but zero into a part of a step, which is 5e-4 long.
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_greedy_answers_are_the_same_on_either_mesh(eight):
    assert eight[0]["generate 8x1"].shape == (8, 24)
    np.testing.assert_array_equal(eight[0]["generate 8x1"], eight[0]["generate 2x4"])


@pytest.mark.parametrize("stage, expected", [("score", []), ("generate", []), ("train", ["all-reduce"])])
def test_collectives_on_the_data_axis(eight, stage, expected):
    """Scoring and decoding exchange nothing; a training step has one reduction, of all gradients and sums together."""
    assert _COLLECTIVE.findall(eight[1]["texts"][stage]) == expected


def test_moments_in_parts_take_an_eighth_and_one_more_exchange(eight):
    """Each device updates its part of the draft, of which the others then need the result: that is all they exchange."""
    whole, parts = eight[0]["optimizer bytes"]
    assert whole / 8 <= parts < whole / 7.9  # the step's counters are whole
    found = _COLLECTIVE.findall(eight[1]["texts"]["train sharded"])
    assert found.count("all-reduce") == 1 and set(found) == {"all-reduce", "all-gather"}, found


@pytest.mark.parametrize("stage", ["score", "generate", "train"])
def test_a_model_axis_can_not_make_data_shards_wait_for_each_other(eight, stage):
    """Data shards go through the vocabulary, and decode, in as many rounds as their rows need: no round may need all of them.

    So devices meet within a data shard alone; and none is sent to another, for which XLA makes all of a CPU's devices meet.
    """
    text = eight[1]["texts"][f"{stage} 2x4"]
    found = _COLLECTIVE.findall(text)
    assert "all-reduce" in found and "collective-permute" not in found
    groups = [group for found in _GROUPS.finditer(text) for group in devices_of(found)]
    within = {tuple(group) for group in groups if len({device // 4 for device in group}) == 1}
    between = {tuple(group) for group in groups} - within
    assert within and between == (set() if stage != "train" else {(0, 4), (1, 5), (2, 6), (3, 7)})


def devices_of(found):
    """The groups of `replica_groups={{0,1},{2,3}}`, `[2,2]<=[4]` or `[2,2]<=[2,2]T(1,0)`."""
    if found["listed"]:
        return [[int(n) for n in group.split(",")] for group in found["listed"].strip("{}").split("},{")]
    shape, over, turned = (
        [int(n) for n in found[name].split(",")] if found[name] else [] for name in ("shape", "over", "turned")
    )
    numbers = np.arange(np.prod(over)).reshape(over)
    return (numbers.transpose(turned) if turned else numbers).reshape(shape).tolist()


def test_work_per_device_shrinks_with_the_devices(eight):
    """Every device is given whole batches: n devices make n times fewer calls, but for the last one's empty places."""
    calls, plans = {int(n): count for n, count in eight[1]["calls"].items()}, eight[1]["plans"]
    assert plans >= 8
    assert calls == {n: -(-plans // n) for n in (1, 2, 4, 8)}
