"""The controller of the devices' outboxes: store what they report, then acknowledge, then show it.

Acknowledged is only what is committed; see watermark.py for how far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edge_contract import canonical, wire
from edge_contract.errors import MessageRejected
from fleet.bus import Bus, Message
from fleet.inventory import Inventory, Progress, Stream
from fleet.lifetime import Stop
from fleet.roster import is_stale

_TICK_S = 0.5
_BATCH = 256
_ASK_EVERY_S = 10.0
_RUNS_AN_ACK = 64
# A device that comes back later sends its rows again anyway.
_ACK_LIFE_S = 60


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop: after so many seconds, so many new records, or neither."""

    for_s: float | None
    count: int | None


@dataclass(frozen=True, slots=True)
class Seen:
    """A record that is new here."""

    device: str
    record: wire.Record


@dataclass(frozen=True, slots=True)
class Turned:
    """A device came or went."""

    device: str
    presence: wire.Presence


@dataclass(frozen=True, slots=True)
class Doubled:
    """Two clients speak as one device: a session came online that is not newer than the last."""

    device: str
    presence: wire.Presence


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that this version cannot read. It is never acknowledged."""

    device: str
    problem: str


Item = Seen | Turned | Doubled | Unreadable | Progress


class Watcher:
    """Construct, then `run`."""

    def __init__(self, bus: Bus, inventory: Inventory, tenant: str, device: str | None) -> None:
        """`device` None watches all devices of the tenant."""
        self._bus = bus
        self._inventory = inventory
        self._topics = wire.Topics(tenant, device or "+")
        self._online: dict[str, wire.Presence] = {}
        self._asked: dict[Stream, tuple[float, int]] = {}

    def run(self, limits: Limits, stop: Stop, show: Callable[[Item], None]) -> None:
        """Until a limit is reached or `stop` is set. Raises TransferFailed, StorageFault."""
        self._bus.subscribe([self._topics.event, self._topics.telemetry, self._topics.presence])
        deadline = None if limits.for_s is None else time.monotonic() + limits.for_s
        shown = 0
        while not stop.is_set() and (deadline is None or time.monotonic() < deadline):
            for item in self._take(self._batch()):
                show(item)
                shown += isinstance(item, Seen)
                if limits.count is not None and shown >= limits.count:
                    return

    def _batch(self) -> list[Message]:
        """What has come, at least one tick's worth: one commit and one acknowledgement for all of it."""
        first = self._bus.next(_TICK_S)
        messages = [] if first is None else [first]
        while messages and len(messages) < _BATCH and (more := self._bus.next(0)) is not None:
            messages.append(more)
        return messages

    def _take(self, messages: list[Message]) -> Iterator[Item]:
        rows: list[tuple[str, str, wire.Record]] = []
        for message in messages:
            parts = wire.split_topic(message.topic)
            if parts is None or not message.payload:
                continue
            tenant, device, kind = parts
            try:
                if kind == "up/presence":
                    yield from self._turned(device, wire.decode(message.payload, wire.Presence))
                else:
                    rows.append((tenant, device, wire.decode(message.payload, wire.Record)))
            except MessageRejected as e:
                yield Unreadable(device, e.what)
        yield from self._record(rows)

    def _record(self, rows: list[tuple[str, str, wire.Record]]) -> Iterator[Item]:
        # Streams that brought only known rows settle too: their acknowledgement may have been lost.
        new, settled = self._inventory.take(rows, time.time_ns() // 1_000_000)
        for progress in settled:
            self._acknowledge(progress)
        for (_, device, record), is_new in zip(rows, new, strict=True):
            if is_new:
                yield Seen(device, record)
        yield from (p for p in settled if p.gaps)

    def _acknowledge(self, progress: Progress) -> None:
        tenant, device, stream, epoch = progress.stream
        resend = self._may_ask(progress)
        if not (progress.seq or progress.have or resend):
            return
        for at in range(0, max(1, len(progress.have)), _RUNS_AN_ACK):
            have = progress.have[at : at + _RUNS_AN_ACK]
            ack = wire.Ack(1, stream, epoch, progress.seq, resend and not at, have)
            self._bus.post(wire.Topics(tenant, device).ack, canonical.to_bytes(ack), expiry_s=_ACK_LIFE_S)

    def _may_ask(self, progress: Progress) -> bool:
        """Ask a device for what is missing: at once, and again when none of it has come for a while."""
        if not progress.missing:
            self._asked.pop(progress.stream, None)
            return False
        now_s = time.monotonic()
        asked_s, missing = self._asked.get(progress.stream, (-_ASK_EVERY_S, progress.missing))
        if now_s - asked_s < _ASK_EVERY_S:
            return False
        self._asked[progress.stream] = (now_s, progress.missing)
        return progress.missing >= missing

    def _turned(self, device: str, presence: wire.Presence) -> Iterator[Turned | Doubled]:
        last = self._online.get(device)
        if presence.status == "online":
            self._online[device] = presence
            # The retained message comes again, as it was, whenever this program connects anew.
            if last is not None and last != presence and presence.session <= last.session:
                yield Doubled(device, presence)
        if last is None or not is_stale(presence, last.session):
            yield Turned(device, presence)
