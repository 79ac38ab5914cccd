"""Chains of faults: one update during which every point is hit once, each followed by what must hold then."""

from __future__ import annotations

from tests.faults.conftest import Cases
from tests.support.rig import Plan, Rig

_TOLD = {"KILL": "kill -9", "SHORT": "short write"}


def run(rig: Rig, plan: Plan, cases: Cases, *, timeout_s: float = 100.0) -> list[str]:
    """Update from version 2 to 3 through all points of the plan; returns the points."""
    rig.plan(plan)
    if "serve" not in plan.processes:
        rig.start("serve")
    rig.want(3)
    hit = []
    for point in rig.points(timeout_s):
        cases.add(f"{plan.when} {point}", _TOLD.get(plan.fault, plan.fault))
        rig.assert_sound(2, 3)
        hit.append(point)
    rig.assert_complete(3, 2)
    assert rig.entry.outcome == "committed"
    return hit
