"""The journal and the list of rejected digests: durable, and nothing a damaged file could stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_agent import files
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.stats import VersionStats, empty_latency
from edge_agent.update import journal
from edge_agent.update.journal import Entry, Ref
from edge_agent.update.machine import State
from edge_agent.update.rejected import Rejected
from edge_contract.errors import Reason, StorageFault
from tests.support.small_disk import small_disk

D1, D2 = "1" * 64, "2" * 64
FULL = Entry(
    schema=1,
    name="tiny",
    state=State.PROBATION,
    generation=7,
    settled_generation=6,
    target=Ref("2.0.0", D2),
    base=Ref("1.0.0", D1),
    older=None,
    attempts=2,
    retry_at_ms=11,
    probation_since_ms=12,
    baseline=VersionStats("tiny", "1.0.0", D1, 5, 10, 1, 0, empty_latency(), {"scores": [4, 6]}),
    outcome="none",
    reason=Reason.OK,
    detail="x",
    since_ms=13,
)

DAMAGE = {
    "empty": b"",
    "zeroed": b"\0" * 300,
    "cut": b'{"schema":1,"name":"tin',
    "another state": b'{"schema":1,"name":"tiny","state":"asleep"}',
    "unknown key": b'{"schema":1,"name":"tiny","mood":"good"}',
    "newer schema": b'{"schema":2,"name":"tiny"}',
    "not text": bytes(range(256)),
}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(Config(tenant="t", device="d", state_dir=str(tmp_path)))
    layout.journal.mkdir(parents=True)
    return layout


@pytest.mark.parametrize("state", State)
def test_an_entry_comes_back_as_it_was(layout: Layout, state: State) -> None:
    entry = replace(FULL, state=state)
    journal.save(layout, entry)
    assert journal.load(layout, "tiny", 99) == (entry, "")
    assert journal.names(layout) == ["tiny"]


def test_a_model_without_a_journal_is_idle(layout: Layout) -> None:
    assert journal.load(layout, "tiny", 99) == (Entry(schema=1, name="tiny", since_ms=99), "")
    assert journal.names(layout) == []


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_journal_is_set_aside_and_told(layout: Layout, damage: bytes) -> None:
    layout.journal_file("tiny").write_bytes(damage)
    entry, problem = journal.load(layout, "tiny", 99)
    assert entry == Entry(schema=1, name="tiny", since_ms=99)
    assert "journal of tiny was damaged" in problem
    assert "set aside as tiny.json.damaged-99" in problem
    assert (layout.journal / "tiny.json.damaged-99").read_bytes() == damage
    assert journal.names(layout) == []


def test_a_journal_that_cannot_be_written_keeps_its_old_entry(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        layout = Layout(Config(tenant="t", device="d", state_dir=str(disk.folder)))
        files.make_folder(layout.journal)
        journal.save(layout, FULL)
        with pytest.raises(StorageFault):
            journal.save(layout, replace(FULL, state=State.REVERTING, detail="x" * (128 << 10)))
        assert journal.load(layout, "tiny", 99) == (FULL, "")


def test_rejected_digests_are_remembered_across_starts(layout: Layout) -> None:
    rejected = Rejected(layout, 1)
    assert (rejected.digests(), rejected.get(D1)) == ([], None)
    rejected.add(D2, Reason.GOLDEN_MISMATCH, "it answers wrongly", 5)
    rejected.add(D1, Reason.OUTPUT_DRIFT, "it drifts", 6)
    again = Rejected(layout, 9)
    assert again.digests() == [D1, D2]
    found = again.get(D2)
    assert found is not None
    assert (found.reason, found.detail, found.at_ms) == (Reason.GOLDEN_MISMATCH, "it answers wrongly", 5)
    assert again.problem == ""


def test_clearing_the_rejected_is_durable_and_counted(layout: Layout) -> None:
    rejected = Rejected(layout, 1)
    rejected.add(D1, Reason.ERROR_RATE, "", 5)
    assert rejected.clear() == 1
    assert rejected.clear() == 0
    assert Rejected(layout, 9).digests() == []


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"nonsense":1}', json.dumps({D1: {"reason": "x"}}).encode()]
)
def test_a_damaged_list_of_rejected_is_set_aside_and_told(layout: Layout, damage: bytes) -> None:
    layout.rejected.write_bytes(damage)
    rejected = Rejected(layout, 77)
    assert rejected.digests() == []
    assert "set aside as rejected.json.damaged-77" in rejected.problem
    assert layout.rejected.with_name("rejected.json.damaged-77").read_bytes() == damage
    rejected.add(D1, Reason.ERROR_RATE, "", 5)
    assert Rejected(layout, 9).digests() == [D1]


def test_a_rejection_that_cannot_be_stored_is_not_remembered_either(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        layout = Layout(Config(tenant="t", device="d", state_dir=str(disk.folder)))
        rejected = Rejected(layout, 1)
        rejected.add(D1, Reason.ERROR_RATE, "short", 5)
        with pytest.raises(StorageFault):
            rejected.add(D2, Reason.ERROR_RATE, "x" * (128 << 10), 5)
        assert rejected.digests() == Rejected(layout, 2).digests() == [D1]
