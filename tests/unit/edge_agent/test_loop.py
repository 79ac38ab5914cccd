"""The loop of the control process: no part of it, and no stranger's message, ends the others."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.app import App, clock_ms, monotonic_ms
from edge_agent.config import Broker, Config, Telemetry
from edge_agent.messaging.mqtt import Message
from edge_agent.messaging.pace import ALERT, EVENT, NOTE, TELEMETRY
from edge_contract import wire
from edge_contract.errors import Reason
from tests.support.broker import free_port

OUTBOX_BYTES = 1 << 20


@pytest.fixture
def app() -> Iterator[App]:
    """Constructed and turned by hand; it never connects to anything."""
    with tempfile.TemporaryDirectory(prefix="ew-") as folder:
        config = Config(
            tenant="acme",
            device="x",
            state_dir=f"{folder}/state",
            run_dir=f"{folder}/run",
            broker=Broker(port=free_port()),
            telemetry=Telemetry(outbox_max_bytes=OUTBOX_BYTES),
        )
        made = App(Path(folder, "agent.toml"), config)
        yield made
        made._updater.stop()
        made._operators.stop()
        made._link.stop()
        made._outbox.close(monotonic_ms())


def rows(app: App, priority: int) -> list[dict[str, Any]]:
    """Payloads that wait."""
    app._link.store(monotonic_ms())
    outbox = app._outbox
    found = outbox.after(priority, 0, outbox.newest_id, 10_000, monotonic_ms())
    return [json.loads(row.data)["payload"] for row in found]


def faults(app: App) -> list[str]:
    return [e["detail"] for e in rows(app, ALERT) if e["kind"] == "fault"]


def test_a_mistake_in_one_part_is_logged_and_reported_and_ends_no_other(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spoken: list[int] = []

    def broken(*_: Any, **__: Any) -> Any:
        raise IndexError("no such thing")

    monkeypatch.setattr(app._sampler, "sample", broken)
    monkeypatch.setattr(app, "_speak", spoken.append)
    app._next_sample_ms = 0
    for _ in range(20):
        app._next_sample_ms = 0
        app._tick(clock_ms())
    assert len(spoken) == 20
    (told,) = faults(app)
    assert "_sample failed: IndexError: no such thing" in told
    (logged,) = [r for r in caplog.records if r.exc_info and r.levelno == logging.ERROR]
    assert "IndexError" in logged.getMessage()


def test_a_message_that_nobody_foresaw_ends_nothing(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(app._link, "acknowledge", broken)
    app._route(Message(app._link.topics.ack, b"{}", "", b""), clock_ms())
    assert "taking Message failed: KeyError" in faults(app)[0]


def test_refusals_that_quote_a_stranger_push_nothing_out_of_the_outbox(app: App) -> None:
    for number in range(200):
        event = wire.Event(number, "update", model=f"m{number}", detail="d")
        app._outbox.put("event", event, priority=EVENT, now_ms=monotonic_ms(), life_s=1e6)
        app._outbox.put("tel", event, priority=TELEMETRY, now_ms=monotonic_ms(), life_s=1e6)
    app._operators.asked = True
    app._operators.keys = wire.Operators(1, 1, [wire.OperatorKey("ab" * 32, "x")])
    app._operators.reload = lambda: None  # type: ignore[method-assign]
    flood = b'{"' + b"A" * 250_000 + b'":1}'
    for topic in (app._link.topics.command, app._link.topics.desired, app._link.topics.ack):
        for _ in range(60):
            app._route(Message(topic, flood, "", b""), clock_ms())
            app._link.store(monotonic_ms())
    assert len(rows(app, EVENT)) >= 200
    assert len(rows(app, TELEMETRY)) == 200
    refusals = rows(app, NOTE)
    assert 0 < len(refusals) <= 50
    assert all(len(e["detail"]) <= 300 and e["reason"] == Reason.MESSAGE_MALFORMED for e in refusals)
    assert "[message_malformed] →" in refusals[0]["detail"]
    refused = app._state(clock_ms()).refused
    assert 0 < len(refused) <= 300
    assert "[message_malformed] →" in refused
