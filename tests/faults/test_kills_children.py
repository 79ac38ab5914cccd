"""kill -9 of the children and of the inference process before and after every durable operation of theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import chains
from tests.faults.conftest import Cases
from tests.support.rig import FORM_BYTES, Plan, Rig, Shelf

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def rig(shelf: Shelf) -> Iterator[Rig]:
    with Rig(shelf) as rig:
        yield rig


def test_the_fetch_child_killed_before_every_kind_of_operation(rig: Rig, cases: Cases) -> None:
    hit = chains.run(rig, Plan(["fetch"], "KILL", "before", grain="kind"), cases)
    assert {point.rpartition(" ")[2] for point in hit} >= {"replace", "link", "fsync", "syncfs", "rename"}


@pytest.mark.thorough
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_fetch_child_killed_at_every_operation(rig: Rig, cases: Cases, when: str) -> None:
    assert len(chains.run(rig, Plan(["fetch"], "KILL", when), cases, timeout_s=500)) >= 30


@pytest.mark.thorough
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["mkdir", "fsync", "replace", "syncfs", "rename"])
def test_the_preflight_child_killed(shelf: Shelf, cases: Cases, operation: str, when: str) -> None:
    """It is started once in an attempt, so each operation takes an update of its own."""
    with Rig(shelf, prepared_max_bytes=FORM_BYTES) as rig:
        assert chains.run(rig, Plan(["preflight"], "KILL", when, [operation]), cases)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_inference_process_killed_at_its_start(rig: Rig, cases: Cases, when: str) -> None:
    """It counts its starts on the disk; each kill is followed by a start that serves."""
    plan = Plan(["serve"], "KILL", when)
    hit: list[str] = []
    while True:
        rig.plan(plan, done=hit)
        rig.start("serve")
        rig.until(lambda: rig.ended("serve") is not None or rig.serves(), "an end or an answer")
        if rig.ended("serve") is None:
            break
        assert len(rig.hit) == len(hit) + 1, rig.device.log
        hit = rig.hit
        cases.add(f"{when} {hit[-1]}", "kill -9")
        rig.plan(None)
        rig.start("serve")
        rig.assert_answers_among(2)
        rig.end("serve")
    assert len(hit) >= 4
    rig.assert_answers_among(2)
