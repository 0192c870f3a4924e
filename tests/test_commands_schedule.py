"""The compiler's cycles, summed over loops that count to a constant, loops that do not, and branches."""

import pytest

from jsfdd.commands.schedule import schedule

TEXT = """HloModule jit_f, is_scheduled=true

%layer.condition (p: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%counted.condition (q: (s32[], s32[])) -> pred[] {
  %q = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  ROOT %lt.2 = pred[]{:T(512)} compare(%j, %rounds), direction=LT
}

%branch.1 (r: f32[8]) -> f32[8] {
  ROOT %negate.1 = f32[8]{0} fusion(%r), calls=%fused, backend_config={"estimated_cycles":"7"}
}

%layer.body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %dot.1 = f32[8]{0} fusion(%p), calls=%fused, metadata={op_name="jit(f)/body/dot"}, backend_config={"estimated_cycles":"100"}
  %either = f32[8]{0} conditional(%dot.1, %dot.1), branch_computations={%branch.1, %branch.1}
  %unknown.1 = f32[8]{0} while(%dot.1), condition=%counted.condition, body=%inner.body
}

%inner.body (p: f32[8]) -> f32[8] {
  ROOT %add.1 = f32[8]{0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"2"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %layers = (s32[], f32[8]{0}) while(%a), condition=%layer.condition, body=%layer.body
  %endless = f32[8]{0} custom-call(%a), backend_config={"estimated_cycles":"9223372036854775807"}
  %blocks = (s32[], s32[]) while(%a), condition=%counted.condition, body=%inner.body
  ROOT %copy.1 = f32[8]{0} copy(%a), backend_config={"estimated_cycles":"40"}
}
"""


@pytest.mark.parametrize(("rounds", "blocks"), [(1, 1), (5, 5)])
def test_cycles_times_rounds(rounds, blocks):
    """Three layers; in them both branches and a loop of unknown rounds, once or as often as asked; then blocks and a copy."""
    steps = schedule(TEXT, rounds)
    found = {step.name: step.cycles for step in steps if step.name != "add.1"}
    assert found == {"dot.1": 300, "negate.1": 21, "copy.1": 40}
    assert sorted(step.cycles for step in steps if step.name == "add.1") == sorted([2 * blocks, 6 * rounds])
    assert next(step for step in steps if step.name == "dot.1").operation == "jit(f)/body/dot"
