"""systemd's notification protocol, against a real datagram socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from edge_agent import sdnotify


@pytest.mark.parametrize("abstract", [False, True])
def test_messages_reach_the_manager(tmp_path: Path, abstract: bool) -> None:
    address = f"@edgeward-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0", 1) if abstract else address)
        manager.settimeout(5)
        assert sdnotify.notify("READY=1\nSTATUS=fine", {"NOTIFY_SOCKET": address})
        assert manager.recv(100) == b"READY=1\nSTATUS=fine"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all"])
def test_nobody_listens(address: str) -> None:
    assert sdnotify.notify(sdnotify.READY, {"NOTIFY_SOCKET": address}) is False
    assert sdnotify.notify(sdnotify.READY, {}) is False


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "42"}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdogs_period(environ: dict[str, str], expected: float | None) -> None:
    assert sdnotify.watchdog_s(environ, pid=42) == expected
