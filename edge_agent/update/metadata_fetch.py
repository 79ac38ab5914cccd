"""One metadata file over HTTP: bounded in bytes and in patience, in memory, by the device's own client.

What is in it is not looked at here. A file is small, so it is not resumed but asked for again.
"""

from __future__ import annotations

import random
import time

from edge_agent.config import Registry
from edge_agent.update.answers import AGAIN
from edge_agent.update.http import HttpStatus, Streams, shown
from edge_agent.update.pacing import LowSpeed, backoff_s
from edge_contract.errors import Reason, TransferFailed


class TooLong(Exception):
    """The other end sends more than the file may have."""


def fetch(client: Streams, registry: Registry, url: str, limit_bytes: int, ends_s: float) -> bytes:
    """The file's bytes, by `ends_s` (monotonic). Raises TransferFailed, of it HttpStatus, and TooLong."""
    failures = 0
    while True:
        try:
            return _once(client, registry, url, limit_bytes, ends_s)
        except TransferFailed as e:
            failures += 1
            final = isinstance(e, HttpStatus) and e.status not in AGAIN
            _check_deadline(registry, url, ends_s)
            if final or e.reason is not Reason.REGISTRY_UNREACHABLE or failures >= registry.retries:
                raise
        time.sleep(random.uniform(0, backoff_s(failures)))  # noqa: S311 - full jitter


def _check_deadline(registry: Registry, url: str, ends_s: float) -> None:
    if time.monotonic() > ends_s:
        raise TransferFailed(
            Reason.REGISTRY_UNREACHABLE,  # then what was verified before may do
            f"the metadata took longer than {registry.deadline_s:g} s; {shown(url)} has not come",
            "the next attempt begins anew; check the network, or raise [registry] deadline_s",
        )


def _once(client: Streams, registry: Registry, url: str, limit_bytes: int, ends_s: float) -> bytes:
    speed = LowSpeed(float(registry.low_speed_bytes_per_s), registry.low_speed_s, time.monotonic())
    data = bytearray()
    for chunk in client.stream(url):
        data += chunk
        if len(data) > limit_bytes:
            raise TooLong(f"{shown(url)} is longer than {limit_bytes} bytes")
        _check_deadline(registry, url, ends_s)
        if speed.too_slow(len(chunk), time.monotonic()):
            raise TransferFailed(
                Reason.REGISTRY_UNREACHABLE,
                f"{shown(url)} comes too slowly: fewer than {registry.low_speed_bytes_per_s} bytes a second",
                "check the network; lower [registry] low_speed_bytes_per_s for such a link",
            )
    return bytes(data)
