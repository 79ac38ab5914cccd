"""Which row goes next: alerts, new rows, backlog beside them; what comes again, and when."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

from edge_agent.messaging.pace import ALERT, EVENT, MAX_IN_HAND, NO_SUBSCRIBERS, TELEMETRY, Pace

RESEND_MS = 30_000
QUOTA = 0x97


class Row(NamedTuple):
    id: int
    priority: int

    @property
    def stream(self) -> str:
        return "tel" if self.priority == TELEMETRY else "event"


class Box:
    """What the outbox is to the pace, and a broker and a controller on top."""

    def __init__(self, *, rows_per_s: float = 20.0, jitter: Callable[[], float] = lambda: 1.0) -> None:
        self.pace = Pace(resend_ms=RESEND_MS, rows_per_s=rows_per_s, jitter=jitter)
        self.rows: dict[int, Row] = {}
        self.newest = 0
        self.sent: list[tuple[int, int]] = []

    def put(self, priority: int = TELEMETRY, count: int = 1) -> list[int]:
        ids = [self.newest + i + 1 for i in range(count)]
        self.rows |= {i: Row(i, priority) for i in ids}
        self.newest = ids[-1]
        return ids

    def begin(self, now_ms: int = 0) -> None:
        self.pace.begin(self.newest, now_ms)

    def turn(self, now_ms: int) -> list[int]:
        """What goes out now; it is in hand afterwards."""
        out = []
        for ask in self.pace.asks(self.newest, now_ms):
            found = [
                row
                for row in self.rows.values()
                if row.priority == ask.priority and ask.after_id < row.id <= ask.until_id
            ][: ask.limit]
            for row in found:
                if self.pace.take(ask, row.id, row.stream, now_ms):  # type: ignore[arg-type]
                    out.append(row.id)
            self.pace.looked(ask, len(found))
        self.sent += [(now_ms, i) for i in out]
        assert self.pace.in_hand <= MAX_IN_HAND
        return out

    def deliver(self, now_ms: int, code: int = 0, *, acknowledged: bool = True) -> list[int]:
        """Turns until nothing goes out any more; the broker answers at once."""
        out: list[int] = []
        while batch := self.turn(now_ms):
            for id_ in batch:
                self.pace.answered(id_, code, now_ms)
            if acknowledged:
                self.acknowledge(*batch)
            out += batch
        return out

    def acknowledge(self, *ids: int) -> None:
        for id_ in ids:
            self.rows.pop(id_, None)
        self.pace.gone(set(ids))


def test_a_handful_at_a_time() -> None:
    box = Box()
    box.begin()
    ids = box.put(count=50)
    assert box.turn(0) == ids[:MAX_IN_HAND]
    assert box.turn(0) == []
    box.pace.answered(ids[3], 0, 0)
    assert box.turn(0) == [ids[20]]


def test_alerts_first_then_events_then_telemetry() -> None:
    box = Box()
    box.begin()
    telemetry, events, alerts = box.put(TELEMETRY, 3), box.put(EVENT, 3), box.put(ALERT, 3)
    assert box.turn(0) == [*alerts, *events, *telemetry]


def test_after_an_outage_the_newest_does_not_wait_behind_the_backlog() -> None:
    box = Box(rows_per_s=20)
    backlog = box.put(TELEMETRY, 8640)
    old_alert = box.put(ALERT)
    box.begin()
    order = box.deliver(0)
    assert order[0] == old_alert[0]
    assert len(order) <= 1 + 20 + 1  # what the bucket holds at the beginning
    delays = []
    for second in range(1, 400):
        fresh = box.put(TELEMETRY)
        sent = [i for ms in range(0, 1000, 100) for i in box.deliver(second * 1000 + ms)]
        delays.append(sent.index(fresh[0]))
        assert len(sent) <= 20 + 2 or second == 1
    assert max(delays) <= 5
    done = [i for _, i in box.sent if i in set(backlog)]
    assert done == sorted(done)
    assert len(done) >= 399 * 19


def test_a_storm_of_new_rows_does_not_starve_the_backlog() -> None:
    box = Box(rows_per_s=100)
    backlog = set(box.put(TELEMETRY, 200))
    box.begin()
    for ms in range(0, 3000, 10):
        box.put(TELEMETRY, 40)
        for id_ in box.turn(ms):
            box.pace.answered(id_, 0, ms)
            box.acknowledge(id_)
    assert backlog <= {i for _, i in box.sent}


def test_every_row_of_the_backlog_goes_once() -> None:
    box = Box(rows_per_s=1000)
    ids = [i for _ in range(100) for i in (*box.put(TELEMETRY, 5), *box.put(EVENT), *box.put(ALERT))]
    box.begin()
    for ms in range(0, 5000, 50):
        box.deliver(ms)
    assert sorted(i for _, i in box.sent) == sorted(ids)


def test_what_the_controller_does_not_acknowledge_comes_again_in_growing_rounds() -> None:
    box = Box(rows_per_s=1000)
    box.begin()
    (id_,) = box.put(EVENT)
    for ms in range(0, 4_000_000, 500):
        box.deliver(ms, acknowledged=False)
    times = [ms for ms, _ in box.sent]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert {i for _, i in box.sent} == {id_}
    assert pauses[0] <= RESEND_MS + 1000
    assert pauses == sorted(pauses)
    assert 32 * RESEND_MS <= pauses[-1] <= 65 * RESEND_MS
    assert all(b <= 2 * a + 1000 for a, b in itertools.pairwise(pauses))


def test_a_row_that_no_controller_can_read_holds_up_no_other() -> None:
    box = Box(rows_per_s=20)
    box.begin()
    unreadable = set(box.put(EVENT, 300))
    for ms in range(0, 600_000, 100):
        if ms % 10_000 == 0:
            box.put(EVENT)
        for id_ in box.turn(ms):
            box.pace.answered(id_, 0, ms)
            if id_ not in unreadable:
                box.acknowledge(id_)
    assert set(box.rows) == unreadable
    assert len(box.sent) < 300 * 8 + 100


def test_a_lost_row_comes_again_soon_when_the_controller_asks() -> None:
    box = Box()
    box.begin()
    first, second = box.put(EVENT, 2)
    box.deliver(0, acknowledged=False)
    box.acknowledge(second)
    assert box.deliver(1000) == []
    box.pace.resend("event")
    assert box.deliver(1100) == [first]


def test_what_was_in_hand_goes_again_with_the_next_connection_and_what_waits_does_not() -> None:
    box = Box()
    box.begin()
    a, b = box.put(EVENT, 2)
    box.turn(0)
    box.pace.answered(a, 0, 10)
    box.begin(1000)
    assert box.deliver(1000) == [b]


def test_another_database_begins_anew() -> None:
    box = Box()
    box.begin()
    box.put(EVENT, 2)
    box.deliver(0, acknowledged=False)
    box.pace.begin(box.newest, 1000, new_box=True)
    assert box.deliver(1000) == [1, 2]


def test_a_refusal_keeps_the_row_and_pauses_its_stream_only() -> None:
    box = Box(rows_per_s=1000)
    box.begin()
    events = box.put(EVENT, 50)
    assert box.turn(0) == events[:20]
    for id_ in events[:20]:
        box.pace.answered(id_, QUOTA, 0)
    assert box.turn(500) == []
    telemetry = box.put(TELEMETRY, 3)
    assert box.deliver(600) == telemetry
    # One at a time, with growing pauses, until one is taken.
    (probe,) = box.turn(1000)
    assert box.turn(1000) == []
    box.pace.answered(probe, QUOTA, 1000)
    assert box.turn(2500) == []
    (probe,) = box.turn(3100)
    box.pace.answered(probe, 0, 3100)
    box.acknowledge(probe)
    rest = [i for ms in range(3200, 4200, 100) for i in box.deliver(ms)]
    assert sorted([*rest, probe]) == events
    assert box.pace.refusals == {QUOTA: 21}


def test_refusals_for_hours_are_no_hammering() -> None:
    box = Box(rows_per_s=1000)
    box.begin()
    box.put(EVENT, 1000)
    for ms in range(0, 3_600_000, 100):
        for id_ in box.turn(ms):
            box.pace.answered(id_, 0x87, ms)
    assert len(box.sent) <= 20 + 9 + 3600 / 300
    assert len(box.rows) == 1000


def test_nobody_listens_is_tried_again_as_often_as_a_row_is_sent_again() -> None:
    box = Box(rows_per_s=1000)
    box.begin()
    box.put(TELEMETRY, 100)
    for ms in range(0, 600_000, 100):
        for id_ in box.turn(ms):
            box.pace.answered(id_, NO_SUBSCRIBERS, ms)
    probes = [ms for ms, _ in box.sent][20:]
    assert all(b - a <= RESEND_MS + 200 for a, b in itertools.pairwise(probes))
    assert len(probes) < 30
    assert len([i for ms in range(600_000, 640_000, 100) for i in box.deliver(ms)]) == 100


def test_pauses_after_refusals_differ_from_device_to_device() -> None:
    def first_probe(jitter: float) -> int:
        box = Box(jitter=lambda: jitter)
        box.begin()
        box.put(EVENT, 2)
        box.pace.answered(box.turn(0)[0], QUOTA, 0)
        for id_ in (2,):
            box.pace.answered(id_, QUOTA, 0)
        return next(ms for ms in range(0, 5000, 10) if box.turn(ms))

    assert first_probe(0.0) == 500
    assert first_probe(1.0) == 1000


def test_the_window_bounds_what_waits_for_the_controller() -> None:
    box = Box(rows_per_s=10**6)
    box.begin()
    box.put(TELEMETRY, 2000)
    box.deliver(0, acknowledged=False)
    assert len(box.sent) == 512
    # Alerts and events have a window of their own.
    events = box.put(EVENT, 2)
    assert box.deliver(0, acknowledged=False) == events
    box.acknowledge(*[i for _, i in box.sent[:100]])
    assert len(box.deliver(0, acknowledged=False)) == 100


def test_the_oldest_in_hand_is_known() -> None:
    box = Box()
    box.begin()
    assert box.pace.oldest_in_hand_ms() is None
    a, _ = box.put(EVENT, 2)
    box.turn(5)
    box.put(EVENT)
    box.turn(9)
    assert box.pace.oldest_in_hand_ms() == 5
    box.pace.answered(a, 0, 10)
    box.begin(11)
    assert box.pace.oldest_in_hand_ms() is None


def test_late_answers_of_a_session_before_change_nothing() -> None:
    box = Box()
    box.begin()
    (a,) = box.put(EVENT)
    box.turn(0)
    box.begin(10)
    box.pace.answered(a, QUOTA, 20)
    assert box.turn(20) == [a]
    box.pace.answered(a, 0, 30)
    box.pace.answered(a, QUOTA, 40)
    assert box.pace.refusals == {}
