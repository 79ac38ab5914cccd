"""kill -9 of the control process before and after every durable operation, in every state of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge_agent import files
from edge_agent.update.machine import TABLE, State
from edge_contract.errors import Reason
from tests.faults import chains
from tests.faults.conftest import Cases
from tests.support.rig import NAME, Plan, Rig, Shelf

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def rig(shelf: Shelf) -> Iterator[Rig]:
    with Rig(shelf) as rig:
        yield rig


def test_killed_before_every_kind_of_operation(rig: Rig, cases: Cases) -> None:
    """The part that every test run can afford; the rest is below."""
    hit = chains.run(rig, Plan(["run"], "KILL", "before", grain="kind"), cases)
    assert {point.rpartition(" ")[2] for point in hit} >= {"replace", "symlink", "fsync", "rename", "unlink"}


def test_a_device_with_its_default_limits_overcomes_a_kill_or_two(shelf: Shelf, cases: Cases) -> None:
    """Among them one in the middle of the activation; and the new version serves from its prepared form."""
    with Rig(shelf, shipped=True) as rig:
        hit = chains.run(rig, Plan(["run"], "KILL", "before", ["replace", "symlink"], grain="kind"), cases)
        assert len(hit) == 2
        assert files.names(rig.layout.prepared / shelf.versions[2].digest)


@pytest.mark.thorough
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_device_with_its_default_limits_gives_up_whole(shelf: Shelf, cases: Cases, when: str) -> None:
    """Killed at every operation: perhaps the candidate does it, so the version before stays."""
    with Rig(shelf, shipped=True) as rig:
        rig.start("serve")
        rig.want(3)
        rig.plan(Plan(["run"], "KILL", when))
        for point in rig.points(500):
            cases.add(f"{when} {point}, default limits", "kill -9")
            rig.assert_sound(2, 3)
        rig.assert_complete(2, 1)
        assert rig.entry.outcome in ("failed", "reverted")
        assert rig.entry.reason is Reason.FAILED_STARTS


@pytest.mark.thorough
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_operation_of_an_update(rig: Rig, cases: Cases, when: str) -> None:
    hit = chains.run(rig, Plan(["run"], "KILL", when), cases, timeout_s=500)
    assert len(hit) >= 50
    for link in ("current", "previous"):
        assert f"run in activating: replace models/{NAME}/{link}" in hit
    states = {point.partition(":")[0].removeprefix("run in ") for point in hit}
    assert states >= {"resolving", "downloading", "preflight", "activating", "probation", "idle"}


# The rest of an attempt from any state in which a kill may have left the journal, killed at its every step.


@pytest.mark.thorough
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("state", State)
def test_killed_on_the_way_from_every_state(rig: Rig, cases: Cases, state: State, when: str) -> None:
    """Parametrised over the machine: a new state is killed the day it is added."""
    assert (state, "restarted") in {(s, e.value) for s, e in TABLE}
    reverting = state is State.REVERTING
    rig.start("serve")
    rig.want(3)
    rig.put_in_state(state=state, reason=Reason.ERROR_RATE if reverting else Reason.OK)
    rig.plan(Plan(["run"], "KILL", when, ["replace"], only=str(rig.layout.journal_file(NAME))))
    for point in rig.points(200):
        cases.add(f"{when} {point}, from {state.value}", "kill -9")
        rig.assert_sound(2, 3)
    if reverting:
        rig.assert_complete(2, 1)
        assert (rig.entry.outcome, rig.entry.reason) == ("reverted", Reason.ERROR_RATE)
    else:
        rig.assert_complete(3, 2)
        assert rig.entry.outcome == "committed"
