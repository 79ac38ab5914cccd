"""Pure: a bound on events of each kind, so that one noisy source cannot push all others out of the outbox."""

from __future__ import annotations

from typing import NamedTuple

# A source may say so much at once, and then one event in so long.
BURST = 50
EVERY_MS = 30_000


class _Bucket(NamedTuple):
    left: float
    at_ms: int
    dropped: int


class Throttle:
    """One bucket of tokens for each kind of event. Times are monotonic milliseconds."""

    def __init__(self, *, burst: int = BURST, every_ms: int = EVERY_MS) -> None:
        self._burst = burst
        self._every_ms = every_ms
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, kind: str, now_ms: int) -> int | None:
        """None when this event is one too many; else how many of its kind were dropped before it."""
        bucket = self._buckets.get(kind, _Bucket(float(self._burst), now_ms, 0))
        refilled = (now_ms - bucket.at_ms) / self._every_ms
        left = min(float(self._burst), bucket.left + refilled)
        if left < 1:
            self._buckets[kind] = _Bucket(left, now_ms, bucket.dropped + 1)
            return None
        self._buckets[kind] = _Bucket(left - 1, now_ms, 0)
        return bucket.dropped
