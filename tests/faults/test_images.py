"""Power cuts: the disk as it is on the medium after every durable operation of an update, mounted and used.

The state lies on ext4 in a file. After each operation the process stops itself, and the file is copied: what
the kernel has not written yet is missing in the copy, as it would be after a power cut.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from edge_agent import sealed
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.update import journal
from edge_agent.update.floor import order_floor
from edge_agent.update.journal import Entry
from edge_agent.update.rejected import Rejected
from edge_agent.update.store import Store
from edge_contract import wire
from tests.faults.conftest import Cases
from tests.support.mounts import Ext4, mount_image, unmount
from tests.support.rig import NAME, Plan, Rig, Shelf

pytestmark = [pytest.mark.timeout(900), pytest.mark.thorough]
PROCESSES = ("run", "fetch")


class Snapshot(NamedTuple):
    """The disk after an operation, and what the journal said in memory then."""

    point: str
    image: Path


class Powered(NamedTuple):
    """A device on a disk of its own, and its disk's copies during one update."""

    rig: Rig
    snapshots: list[Snapshot]


@pytest.fixture(scope="module")
def powered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Powered]:
    folder = tmp_path_factory.mktemp("images")
    disk = Ext4(folder / "disk.img")
    rig = Rig(
        Shelf(folder / "shelf"),
        prepare=lambda state: mount_image(disk.image, state),
    )
    mounted = [rig.layout.state]
    try:
        os.sync()  # versions 1 and 2 were installed without the agent
        snapshots = list(_update(rig, disk, folder))
        rig.end("run")
        rig.end("serve")
        unmount(mounted.pop())
        yield Powered(rig, snapshots)
    finally:
        rig.end("run")
        rig.end("serve")
        for path in mounted:
            unmount(path)
        rig.close()
        shutil.rmtree(folder)


def _update(rig: Rig, disk: Ext4, folder: Path) -> Iterator[Snapshot]:
    rig.plan(Plan(PROCESSES, "STOP", "after"))
    rig.start("serve")
    rig.want(3)
    for number, point in enumerate(rig.points(600)):
        # Two threads or processes may come to their points at once, and are stopped and resumed together.
        rig.until(partial(_stopped_or_past, rig, number), f"the stop at {point}")
        stopped = rig.stopped()
        if stopped:
            yield Snapshot(point, disk.snapshot(folder / f"{number:03d}.img"))
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    rig.assert_complete(3, 2)


def _stopped_or_past(rig: Rig, number: int) -> bool:
    return bool(rig.stopped()) or len(rig.hit) > number + 1 or rig.settled


def test_after_a_power_cut_at_any_operation_one_version_is_whole_and_named(
    powered: Powered, cases: Cases, tmp_path: Path
) -> None:
    digests = [bundle.digest for bundle in powered.rig.shelf.versions]
    # Two processes may come to their points at once and share an image, so a few less than points.
    assert len(powered.snapshots) >= max(60, 0.75 * len(powered.rig.hit))
    named = set()
    for snapshot in powered.snapshots:
        cases.add(f"after {snapshot.point}", "power cut")
        mount_image(snapshot.image, tmp_path)
        try:
            current, previous = _check(tmp_path, snapshot.point)
        finally:
            unmount(tmp_path)
        assert current in digests[1:], snapshot.point
        assert previous in digests, snapshot.point
        named.add(current)
    assert named == set(digests[1:])


def _check(state: Path, point: str) -> tuple[str | None, str | None]:
    layout = Layout(Config(tenant="tests", device="rig", state_dir=str(state)))
    store = Store(layout)
    current, previous = store.named(NAME)
    for digest in (current, previous):
        assert digest is None or store.has(digest), f"{point}: {digest} is not whole"
    entry, problem = journal.load(layout, NAME, 0)
    assert problem == "", point
    if entry.outcome == "committed" and entry.target is not None:
        assert current == entry.target.digest, f"{point}: committed, but the link names {current}"
    assert Rejected(layout, 0).problem == "", point
    assert order_floor(layout).problems in ([], [f"{layout.floor_copies('orders')[1]} is missing"]), point
    assert isinstance(sealed.read(layout.desired, wire.Desired), wire.Desired | None), point
    return current, previous


@pytest.mark.parametrize(
    "state", ["resolving", "downloading", "preflight", "activating", "probation", "idle"]
)
def test_after_a_power_cut_in_a_state_the_device_goes_on_to_the_end(
    powered: Powered, cases: Cases, state: str
) -> None:
    """The middle one of the copies of each state is put in the device, and switched on."""
    rig = powered.rig
    of_state = [s for s in powered.snapshots if s.point.startswith(f"run in {state}:")]
    chosen = of_state[len(of_state) // 2]
    cases.add(f"after {chosen.point}, switched on", "power cut")
    rig.plan(None)
    mount_image(chosen.image, rig.layout.state)
    try:
        assert isinstance(rig.entry, Entry)
        rig.start("serve")
        rig.assert_sound(2, 3)
        if sealed.read(rig.layout.desired, wire.Desired) is None:
            rig.want(3)  # the broker has it
        rig.start("run")
        rig.until(lambda: rig.settled, "the end")
        rig.assert_complete(3, 2)
    finally:
        rig.end("run")
        rig.end("serve")
        unmount(rig.layout.state)
