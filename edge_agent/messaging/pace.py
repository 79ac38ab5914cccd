"""Pure: which row goes to the broker next, and when one goes again.

It serves operators: alerts first, whatever their age; then what is new; and beside it, at a bounded rate,
the backlog of an outage, oldest first. So nobody waits behind a day of backlog for the newest state.

A row is sent once in each *round*: until the broker answers it is in hand; then it waits for the
controller; when that takes too long, the row belongs to the next round, and rounds grow further apart.
Ids are those of one opened box; a row that is in the box is fresh, of the backlog, in hand or waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from edge_contract import wire

# A note is an event that strangers can cause: it must not push out what happened to the models.
ALERT, EVENT, NOTE, TELEMETRY = 20, 10, 5, 1
PRIORITIES: tuple[tuple[int, wire.StreamName], ...] = (
    (ALERT, "event"),
    (EVENT, "event"),
    (NOTE, "event"),
    (TELEMETRY, "tel"),
)

# What the client may hold at once: it keeps nothing across a restart, so the rest stays in the outbox.
MAX_IN_HAND = 20
# How many of those the backlog may take before new rows are looked at.
_BACKLOG_SHARE = 5
# Rows of a stream that may wait for the controller; new ones may be twice as many.
_WINDOW = 256
_ROUND_DOUBLINGS = 6
_FIRST_PAUSE_MS = 1_000
_MAX_PAUSES = 10  # a refusal is tried again after so many times the resend time at the latest
NO_SUBSCRIBERS = 0x10
_FIRST_FAILURE = 0x80


class Ask(NamedTuple):
    """What to look for in the box: up to `limit` rows of one priority between two ids."""

    priority: int
    after_id: int
    until_id: int
    limit: int
    backlog: bool


class _Sent(NamedTuple):
    stream: wire.StreamName
    at_ms: int
    in_hand: bool
    backlog: bool


@dataclass(slots=True)
class _Gate:
    """A stream that the broker refuses, or that nobody listens to, is tried one row at a time."""

    pause_ms: int = 0
    until_ms: int = 0

    @property
    def shut(self) -> bool:
        return self.pause_ms > 0


@dataclass(slots=True)
class _Round:
    """One pass over the backlog: per priority the last id looked at, and where the pass ends."""

    end_id: int = 0
    cursors: dict[int, int] = field(default_factory=dict)
    number: int = 0
    open: bool = False
    next_ms: int = 0


class Pace:
    """Construct; `begin` with every connection and every new box; then ask, take, and tell it what came."""

    def __init__(self, *, resend_ms: int, rows_per_s: float, jitter: Callable[[], float]) -> None:
        """`jitter` gives numbers in [0, 1), so that a fleet does not come back in one moment."""
        self._resend_ms = resend_ms
        self._rows_per_s = rows_per_s
        self._jitter = jitter
        self._tokens, self._tokens_ms = 0.0, 0
        self._sent: dict[int, _Sent] = {}
        self._hand: set[int] = set()
        self._waiting = {"tel": 0, "event": 0}
        self._fresh: dict[int, int] = {}
        self._fresh_from = 0
        self._round = _Round()
        self._gates = {"tel": _Gate(), "event": _Gate()}
        self._stale = False
        self.refusals: dict[int, int] = {}

    @property
    def in_hand(self) -> int:
        """Rows that the client holds."""
        return len(self._hand)

    def begin(self, newest_id: int, now_ms: int, *, new_box: bool = False) -> None:
        """A connection begins: everything up to `newest_id` is backlog, unless it waits already."""
        for id_ in [i for i, s in self._sent.items() if new_box or s.in_hand]:
            self._forget(id_)
        self._fresh, self._fresh_from = {}, newest_id
        self._round = _Round(newest_id, number=0, open=True)
        self._tokens, self._tokens_ms = float(MAX_IN_HAND), now_ms
        self._stale = False

    def asks(self, newest_id: int, now_ms: int) -> Iterator[Ask]:
        """What to look for now, most urgent first. Take the rows of one before the next is drawn."""
        self._refill(now_ms)
        self._time_out(now_ms)
        self._open_round(now_ms)
        yield from self._lane(ALERT, newest_id, now_ms, backlog=False)
        yield from self._lane(ALERT, newest_id, now_ms, backlog=True)
        share = _BACKLOG_SHARE
        for priority in (EVENT, NOTE, TELEMETRY):
            before = self.in_hand
            yield from self._lane(priority, newest_id, now_ms, backlog=True, share=share)
            share -= self.in_hand - before
        yield from self._lane(EVENT, newest_id, now_ms, backlog=False)
        yield from self._lane(NOTE, newest_id, now_ms, backlog=False)
        yield from self._lane(TELEMETRY, newest_id, now_ms, backlog=False)
        for priority in (EVENT, NOTE, TELEMETRY):
            yield from self._lane(priority, newest_id, now_ms, backlog=True)

    def take(self, ask: Ask, id_: int, stream: wire.StreamName, now_ms: int) -> bool:
        """Whether to publish this row, which `ask` has found; if so, it is in hand from now on."""
        cursors = self._round.cursors if ask.backlog else self._fresh
        cursors[ask.priority] = id_
        if id_ in self._sent:
            return False
        if ask.backlog and ask.priority != ALERT:
            self._tokens -= 1
        self._sent[id_] = _Sent(stream, now_ms, in_hand=True, backlog=ask.backlog)
        self._hand.add(id_)
        self._waiting[stream] += 1
        return True

    def looked(self, ask: Ask, found: int) -> None:
        """`ask` found so many rows: fewer than its limit means that this lane is done."""
        if found < ask.limit:
            cursors = self._round.cursors if ask.backlog else self._fresh
            cursors[ask.priority] = ask.until_id

    def answered(self, id_: int, code: int, now_ms: int) -> None:
        """The broker's word on a row: an MQTT 5 reason code."""
        sent = self._sent.get(id_)
        if sent is None or not sent.in_hand:
            return
        gate = self._gates[sent.stream]
        if code < _FIRST_FAILURE and code != NO_SUBSCRIBERS:
            self._hand.discard(id_)
            self._sent[id_] = sent._replace(at_ms=now_ms, in_hand=False)
            if gate.shut:
                self._gates[sent.stream] = _Gate()
                self._again()
            return
        # The row stays in the box, and the stream is left alone for a while: a broker that is over its
        # quota must not be hammered, and rows that nobody listens to need not be sent.
        self._forget(id_)
        self._stale = True
        self.refusals[code] = self.refusals.get(code, 0) + 1
        cap_ms = self._resend_ms * (1 if code == NO_SUBSCRIBERS else _MAX_PAUSES)
        if now_ms >= gate.until_ms:
            gate.pause_ms = min(max(2 * gate.pause_ms, _FIRST_PAUSE_MS), max(cap_ms, 1))
            gate.until_ms = now_ms + int(gate.pause_ms * (0.5 + 0.5 * self._jitter()))

    def gone(self, ids: set[int]) -> None:
        """These rows are no more in the box: the controller has them, or they were evicted."""
        for id_ in ids & self._sent.keys():
            if self._sent[id_].backlog:
                self._round.number = 0  # it gets on: the next round need not wait long
            self._forget(id_)

    def resend(self, stream: wire.StreamName) -> None:
        """The controller misses rows of a stream and saw none of them coming."""
        for id_ in [i for i, s in self._sent.items() if s.stream == stream and not s.in_hand]:
            self._forget(id_)
        self._gates[stream] = _Gate()
        self._again()

    def oldest_in_hand_ms(self) -> int | None:
        """Since when the row that waits longest for the broker's answer is in hand."""
        return min((self._sent[i].at_ms for i in self._hand), default=None)

    def _lane(
        self, priority: int, newest_id: int, now_ms: int, *, backlog: bool, share: int = MAX_IN_HAND
    ) -> Iterator[Ask]:
        stream: wire.StreamName = "tel" if priority == TELEMETRY else "event"
        if backlog:
            after_id, until_id = self._round.cursors.get(priority, 0), self._round.end_id
            if not self._round.open:
                return
        else:
            after_id, until_id = self._fresh.get(priority, self._fresh_from), newest_id
        room = min(self._room(stream, now_ms, backlog=backlog), share)
        if backlog and priority != ALERT:
            room = min(room, int(self._tokens))
        if room > 0 and after_id < until_id:
            yield Ask(priority, after_id, until_id, room, backlog)

    def _room(self, stream: wire.StreamName, now_ms: int, *, backlog: bool) -> int:
        gate = self._gates[stream]
        if gate.shut:
            busy = any(self._sent[i].stream == stream for i in self._hand)
            return 0 if busy or now_ms < gate.until_ms else 1
        window = _WINDOW if backlog else 2 * _WINDOW
        return min(MAX_IN_HAND - len(self._hand), window - self._waiting[stream])

    def _refill(self, now_ms: int) -> None:
        passed_s = max(0, now_ms - self._tokens_ms) / 1000
        full = max(float(MAX_IN_HAND), self._rows_per_s)
        self._tokens = min(full, self._tokens + passed_s * self._rows_per_s)
        self._tokens_ms = now_ms

    def _time_out(self, now_ms: int) -> None:
        """Rows of which the controller said nothing in time belong to the next round."""
        # In the order of sending, nearly: an answer moves no entry. One that is late is seen next time.
        late = []
        for id_, sent in self._sent.items():
            if now_ms - sent.at_ms < self._resend_ms:
                break
            if not sent.in_hand:
                late.append(id_)
        for id_ in late:
            self._forget(id_)
            self._stale = True

    def _open_round(self, now_ms: int) -> None:
        round_ = self._round
        if round_.open and all(round_.cursors.get(p, 0) >= round_.end_id for p, _ in PRIORITIES):
            round_.open = False
            round_.number += 1
            pause_ms = self._resend_ms << min(round_.number - 1, _ROUND_DOUBLINGS)
            round_.next_ms = now_ms + (0 if round_.number <= 1 else pause_ms)
        if not round_.open and self._stale and now_ms >= round_.next_ms:
            end_id = max(self._fresh.values(), default=self._fresh_from)
            self._round = _Round(end_id, number=round_.number, open=True)
            self._stale = False

    def _again(self) -> None:
        """Another round as soon as the present one is over."""
        self._stale = True
        self._round.number = 0
        self._round.next_ms = 0

    def _forget(self, id_: int) -> None:
        sent = self._sent.pop(id_)
        self._hand.discard(id_)
        self._waiting[sent.stream] -= 1
