"""Outbox, pace and controller together over a channel that loses, repeats and reorders; restarts at any time.

Whatever happens, in the end the controller holds every row once or knows that it is gone, and the device
holds nothing any more.
"""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest

from edge_agent.messaging.outbox import Outbox
from edge_agent.messaging.pace import ALERT, EVENT, TELEMETRY, Pace
from edge_contract import canonical, wire
from fleet.inventory import Inventory

TURN_MS = 100


class World:
    """One device, one controller, and what is on its way between them."""

    def __init__(self, folder: Path, rng: random.Random, outbox_bytes: int) -> None:
        self.folder, self.rng, self._bytes = folder, rng, outbox_bytes
        self.now_ms = 0
        self.put: dict[tuple[str, str, int], int] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self.up: list[bytes] = []
        self.down: list[bytes] = []
        self.loss = 0.2
        self._number = 0
        self.databases: list[Path] = []
        self.start_controller()
        self.start()

    def start_controller(self) -> None:
        """With a database that knows nothing."""
        self.databases.append(self.folder / f"fleet{len(self.databases)}.db")
        self.inventory = Inventory(self.databases[-1], patience_ms=5_000)

    def start(self) -> None:
        path = self.folder / "outbox.db"
        self.outbox = Outbox(path, max_bytes=self._bytes, now_ms=self.now_ms, stamp_ms=0)
        self.pace = Pace(resend_ms=1_000, rows_per_s=200.0, jitter=self.rng.random)
        self.connect()

    def connect(self) -> None:
        self.in_hand: list[int] = []
        self.pace.begin(self.outbox.newest_id, self.now_ms)

    def add(self, count: int) -> None:
        for _ in range(count):
            self._number += 1
            priority = self.rng.choice([ALERT, EVENT, TELEMETRY, TELEMETRY, TELEMETRY])
            stream: wire.StreamName = "tel" if priority == TELEMETRY else "event"
            self.outbox.put(stream, {"n": self._number}, priority=priority, now_ms=self.now_ms, life_s=1e6)
            key = (stream, self.outbox.epoch)
            self._counts[key] = self._counts.get(key, 0) + 1
            self.put[(*key, self._counts[key])] = self._number
        self.pace.gone(self.outbox.flush(self.now_ms))

    def turn(self) -> None:
        """The device takes acknowledgements and sends; the controller stores and acknowledges."""
        self.now_ms += TURN_MS
        self._device()
        self._controller()

    def _device(self) -> None:
        for data in self._through(self.down):
            ack = wire.decode(data, wire.Ack)
            self.outbox.acknowledged(ack)
            if ack.resend:
                self.pace.resend(ack.stream)
        self.pace.gone(self.outbox.flush(self.now_ms))
        for id_ in self.in_hand:
            lost = self.rng.random() < self.loss / 2
            self.pace.answered(id_, self.rng.choice([0x97, 0x87, 0x10]) if lost else 0, self.now_ms)
        self.in_hand = []
        for ask in self.pace.asks(self.outbox.newest_id, self.now_ms):
            rows = self.outbox.after(ask.priority, ask.after_id, ask.until_id, ask.limit, self.now_ms)
            for row in rows:
                if self.pace.take(ask, row.id, row.stream, self.now_ms):
                    self.up.append(row.data)
                    self.in_hand.append(row.id)
            self.pace.looked(ask, len(rows))

    def _controller(self) -> None:
        records = [("t", "d", wire.decode(data, wire.Record)) for data in self._through(self.up)]
        _, settled = self.inventory.take(records, self.now_ms)
        for progress in settled:
            resend = progress.missing > 0 and self.rng.random() < 0.1
            _, _, stream, epoch = progress.stream
            ack = wire.Ack(1, stream, epoch, progress.seq, resend, progress.have)
            self.down.append(canonical.to_bytes(ack))

    def _through(self, queue: list[bytes]) -> list[bytes]:
        """What arrives now: some is lost, some comes twice, some later."""
        arrived = []
        for data in list(queue):
            fate = self.rng.random()
            if fate < self.loss:
                queue.remove(data)
            elif fate < 0.9:
                queue.remove(data)
                arrived += [data] * self.rng.choice([1, 1, 1, 2])
        self.rng.shuffle(arrived)
        return arrived

    def stored(self, number: int = -1) -> tuple[dict[tuple[str, str, int], int], set[tuple[str, str, int]]]:
        """What the controller holds, and what it knows to be gone (or to have been acknowledged before)."""
        db = sqlite3.connect(self.databases[number])
        query = "SELECT stream, epoch, seq, json_extract(payload, '$.n') FROM records"
        rows = {(s, e, q): n for s, e, q, n in db.execute(query)}
        query = "SELECT stream, epoch, first, last FROM gaps WHERE explained"
        gone = {(s, e, q) for s, e, a, b in db.execute(query) for q in range(a, b + 1)}
        db.close()
        return rows, gone


def live(world: World, steps: int) -> None:
    """Rows, restarts, lost connections, absences of the controller."""
    for _ in range(steps):
        match world.rng.randrange(20):
            case 0:
                world.outbox.close(world.now_ms)
                world.up.clear()
                world.start()
            case 1:
                world.connect()
            case 2:
                for _ in range(world.rng.randrange(30)):
                    world.now_ms += TURN_MS
                    world._device()
                    world.up.clear()
            case _:
                world.add(world.rng.randrange(8))
                world.turn()


def settle(world: World) -> None:
    """A good channel until nothing waits; tombstones travel with rows, so there are some more of those."""
    world.loss = 0.0
    for _ in range(3000):
        world.turn()
        if world.outbox.depth() == 0:
            break
    assert world.outbox.depth() == 0
    for _ in range(60):
        world.add(1)
        world.turn()
    for _ in range(100):
        world.turn()


@pytest.mark.parametrize("outbox_bytes", [400, 100_000], ids=["tight", "roomy"])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_arrives_once_or_is_known_to_be_gone(tmp_path: Path, seed: int, outbox_bytes: int) -> None:
    world = World(tmp_path, random.Random(seed), outbox_bytes)
    live(world, 250)
    settle(world)
    rows, gone = world.stored()
    assert {key: n for key, n in world.put.items() if key not in rows and key not in gone} == {}
    assert {key: n for key, n in rows.items() if world.put.get(key) != n} == {}
    if outbox_bytes > 1000:
        assert gone == set()
    world.outbox.close(world.now_ms)
    world.inventory.__exit__(None, None, None)


@pytest.mark.parametrize("outbox_bytes", [400, 2_000, 100_000])
@pytest.mark.parametrize("seed", range(3))
def test_a_controller_that_loses_its_database_leaves_no_hole(
    tmp_path: Path, seed: int, outbox_bytes: int
) -> None:
    """In mid-flow: the running epoch waits for nothing that the device does not have any more."""
    world = World(tmp_path, random.Random(seed), outbox_bytes)
    for _ in range(3):
        live(world, 80)
        world.inventory.__exit__(None, None, None)
        world.start_controller()
    live(world, 80)
    settle(world)
    known: set[tuple[str, str, int]] = set()
    said: set[tuple[str, str, int]] = set()
    for number in range(len(world.databases)):
        rows, gone = world.stored(number)
        assert {key: n for key, n in rows.items() if world.put.get(key) != n} == {}
        elsewhere = ranges(world.databases[number], "gaps WHERE elsewhere")
        assert elsewhere <= known, "what is said to have been acknowledged before was"
        known |= rows.keys() | (gone - elsewhere)
        said |= elsewhere
    assert world.put.keys() - known == set()
    waiting = {row[1] for row in ranges(world.databases[-1], "runs")}
    assert world.outbox.epoch not in waiting, "in the newest database nothing is missed"
    assert said != set()
    assert world.outbox._box._scalar("SELECT COUNT(*) FROM gone") == 0
    world.outbox.close(world.now_ms)
    world.inventory.__exit__(None, None, None)


def ranges(database: Path, table: str) -> set[tuple[str, str, int]]:
    db = sqlite3.connect(database)
    found = db.execute(f"SELECT stream, epoch, first, last FROM {table}").fetchall()
    db.close()
    return {(s, e, q) for s, e, a, b in found for q in range(a, b + 1)}
