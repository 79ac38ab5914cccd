"""Devices put together from retained messages; late deaths of old sessions are ignored."""

from __future__ import annotations

from typing import Any

import pytest

from edge_contract import canonical, wire
from fleet import roster
from tests.unit.fleet.device_double import FACTS


def presence(status: Any, session: int, at_ms: int = 10) -> wire.Presence:
    return wire.Presence(1, status, session, at_ms)


def birth(session: int, at_ms: int = 5) -> wire.Birth:
    return wire.Birth(1, session, FACTS, [], at_ms)


@pytest.mark.parametrize(
    ("said", "born", "expected"),
    [
        (presence("online", 3), birth(3), ("online", 10)),
        (presence("offline", 3), birth(3), ("offline", 10)),
        # The will of session 3 came after session 4 was born.
        (presence("offline", 3), birth(4), ("online", 5)),
        (presence("offline", 5), birth(4), ("offline", 10)),
        (presence("online", 3), None, ("online", 10)),
        (presence("offline", 3), None, ("offline", 10)),
        (None, birth(3), ("unknown", 5)),
        (None, None, ("unknown", None)),
    ],
)
def test_presence(
    said: wire.Presence | None, born: wire.Birth | None, expected: tuple[str, int | None]
) -> None:
    assert roster.presence_of(said, born) == expected


def test_a_will_is_stale_only_if_it_is_a_will_and_older() -> None:
    assert roster.is_stale(presence("offline", 3), 4)
    assert not roster.is_stale(presence("offline", 4), 4)
    assert not roster.is_stale(presence("online", 3), 4)


def test_devices_are_gathered_by_name() -> None:
    state = wire.State(1, 2, True, [], [], 7)
    a, b = wire.Topics("t", "a"), wire.Topics("t", "b")
    found = roster.gather(
        "t",
        [
            (b.presence, canonical.to_bytes(presence("offline", 1))),
            (a.birth, canonical.to_bytes(birth(1))),
            (a.state, canonical.to_bytes(state)),
            (a.presence, canonical.to_bytes(presence("online", 1))),
            (wire.Topics("other", "c").presence, canonical.to_bytes(presence("online", 1))),
            ("elsewhere", b"x"),
            (wire.Topics("t", "cleared").presence, b""),
        ],
    )
    assert [(d.name, d.status) for d in found] == [("a", "online"), ("b", "offline")]
    assert found[0].state == state
    plain = roster.to_plain(found[0])
    assert (plain["online"], plain["serving"], plain["session"]) == (True, True, 1)


def test_what_cannot_be_read_is_said_and_the_rest_is_shown() -> None:
    topics = wire.Topics("t", "a")
    messages = [(topics.state, b"{"), (topics.presence, canonical.to_bytes(presence("online", 1)))]
    (device,) = roster.gather("t", messages)
    assert device.status == "online"
    assert "state message: not JSON" in device.problem
