"""One metadata file from a real server that drips, or redirects to what is no address."""

from __future__ import annotations

import random
import time

import pytest

from edge_agent.config import Registry
from edge_agent.update import metadata_fetch
from edge_agent.update.http import Client
from edge_contract.errors import Reason, TransferFailed
from tests.support.http_registry import Answer, ScriptedServer, drip, drip_head, redirect, whole

BODY = b"x" * 5000


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 0.0)


def fetch(server: ScriptedServer, span_s: float = 60.0, **options: float) -> bytes:
    registry = Registry(url=server.url, **{"timeout_s": 0.4, "low_speed_s": 0.2, "retries": 2} | options)  # type: ignore[arg-type]
    client = Client(registry)
    return metadata_fetch.fetch(
        client, registry, f"{server.url}/1.root.json", len(BODY), time.monotonic() + span_s
    )


def refusal(answer: Answer, span_s: float = 60.0, **options: float) -> tuple[TransferFailed, int]:
    with ScriptedServer(answer) as server:
        with pytest.raises(TransferFailed) as error:
            fetch(server, span_s, **options)
        return error.value, len(server.seen)


@pytest.mark.parametrize("begun", [b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nX-Long: "])
def test_a_head_that_drips_is_asked_for_again_and_then_given_up(begun: bytes) -> None:
    error, asked = refusal(drip_head(0.05, begun))
    assert (error.reason, asked) == (Reason.REGISTRY_UNREACHABLE, 2)
    assert "too slowly" in error.what


def test_a_head_that_drips_once_is_overcome() -> None:
    with ScriptedServer(drip_head(0.05), whole(BODY)) as server:
        assert fetch(server) == BODY


def test_the_deadline_counts_over_all_attempts() -> None:
    error, asked = refusal(drip_head(0.05), 0.1, retries=1000)
    assert (error.reason, asked) == (Reason.REGISTRY_UNREACHABLE, 1)
    assert "longer than" in error.what


def test_the_deadline_ends_a_body_that_no_low_speed_ends() -> None:
    error, _ = refusal(drip(BODY, 50.0), 0.3, low_speed_bytes_per_s=0)
    assert "longer than" in error.what


@pytest.mark.parametrize("target", ["https://[::1", "https://h:99999/", "http://h:port/", "//[/"])
def test_a_redirect_to_what_is_no_address(target: str) -> None:
    error, _ = refusal(redirect(target))
    assert error.reason is Reason.REGISTRY_UNREACHABLE
    assert "redirects to what is no address" in error.what
    assert "/1.root.json" in error.what
