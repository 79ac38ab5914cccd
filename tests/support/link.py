"""A link with its outbox and the turns of the control loop, in this process; its wall clock can be set."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edge_agent.config import Broker, Config, Telemetry
from edge_agent.messaging.link import Link
from edge_agent.messaging.mqtt import Message
from edge_agent.messaging.outbox import Outbox
from edge_contract import wire
from edge_contract.errors import Reason
from edge_contract.profile import Facts
from tests.support.waiting import wait_for

FACTS = Facts("x86_64", "cpu", [], 2, 1 << 30, "Linux", "3.11", "0.1.0", {})
TOPICS = wire.Topics("acme", "x")


def mono_ms() -> int:
    """Monotonic milliseconds."""
    return time.monotonic_ns() // 1_000_000


class LinkedDevice:
    """A link with a wall clock that can be set."""

    def __init__(self, port: int, folder: Path, **telemetry: Any) -> None:
        """`telemetry` are keys of that section."""
        self.wall_ms = 1_790_000_000_000
        self.outbox = Outbox(folder / "outbox.db", max_bytes=1 << 20, now_ms=mono_ms(), stamp_ms=0)
        config = Config(
            tenant="acme",
            device="x",
            broker=Broker(port=port, reconnect_max_s=0.2),
            telemetry=Telemetry(**telemetry),
        )
        self.told: list[tuple[str, Reason, str]] = []
        birth = lambda session, at_ms: wire.Birth(1, session, FACTS, [], at_ms)  # noqa: E731
        self.link = Link(config, self.outbox, 1, birth, lambda: self.wall_ms, lambda *e: self.told.append(e))
        self.link.start()

    def until(self, look: Any, what: str) -> None:
        """Turns until `look` is true."""

        def turn() -> Any:
            while not self.link.inbox.empty():
                event = self.link.inbox.get()
                if not isinstance(event, Message):
                    self.link.handle(event, mono_ms())
            self.link.store(mono_ms())
            self.link.tick(mono_ms())
            return look()

        wait_for(turn, what, timeout_s=15, every_s=0.01)

    def close(self) -> None:
        """Say offline and close the database."""
        self.link.stop()
        self.outbox.close(mono_ms())
