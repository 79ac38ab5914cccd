"""Where answers to commands go: the field that asks for it is not signed."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.messaging.commands import Commands
from edge_agent.messaging.mqtt import Message
from edge_agent.messaging.outbox import Outbox
from edge_contract import wire

BASE = "edge/v1/t/d/up/res"
COMMAND = wire.Command(1, "t", "d", "id-1", "status", 0, 10)


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (BASE, BASE),
        (f"{BASE}/me", f"{BASE}/me"),
        ("", BASE),
        ("elsewhere", BASE),
        (f"{BASE}x", BASE),
        (f"{BASE}/#", BASE),
        (f"{BASE}/+/a", BASE),
        (f"{BASE}/a\0b", BASE),
        (f"{BASE}/{'a' * 2000}", BASE),
    ],
)
def test_answers_stay_below_the_devices_own_topic(tmp_path: Path, asked: str, used: str) -> None:
    outbox = Outbox(tmp_path / "outbox.db", max_bytes=1 << 20, now_ms=0, stamp_ms=0)
    told: list[str] = []
    commands = Commands(
        {"status": lambda _: {}}, outbox, lambda topic, correlation, body: told.append(topic), BASE
    )
    commands.take(Message("down", b"", asked, b""), COMMAND, 1)
    assert told == [used]
    outbox.close(0)
