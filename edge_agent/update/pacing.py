"""Pure: when a transfer is tried again, when it is too slow, how fast it may go. Seconds come from outside.

Full jitter (a pause drawn evenly from nothing to the bound) after Brooker, "Exponential Backoff And
Jitter", AWS Architecture Blog, 2015. What is fetched is not known here.
"""

from __future__ import annotations

from email.utils import parsedate_to_datetime

_BACKOFF_CAP_S = 30.0
# A pause that a server asks for and that is longer is not sat out in a process that holds memory.
LONGEST_PAUSE_S = 60.0
# Nobody else can reach this device, so no server may send it away for longer.
LONGEST_DEFERRAL_S = 6 * 3600.0


def backoff_s(failures: int) -> float:
    """Upper bound of the pause after so many failures in a row (1 or more)."""
    return float(min(_BACKOFF_CAP_S, 0.5 * 2 ** min(failures, 16)))


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """What a Retry-After header asks for (RFC 9110, 10.2.3), bounded; None when it says nothing sensible."""
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:12]), LONGEST_DEFERRAL_S)
    try:
        asked_s = parsedate_to_datetime(text).timestamp() - now_s
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, asked_s), LONGEST_DEFERRAL_S)


class LowSpeed:
    """Whether a transfer is too slow to be worth its connection: counted in spans of `span_s`."""

    def __init__(self, bytes_per_s: float, span_s: float, now_s: float) -> None:
        self._least = bytes_per_s * span_s
        self._span_s = span_s
        self._begun_s = now_s
        self._received = 0

    def too_slow(self, received: int, now_s: float) -> bool:
        """Count `received` bytes; True when a span is over and held fewer than it must."""
        self._received += received
        if now_s - self._begun_s < self._span_s:
            return False
        slow = self._received < self._least
        self._begun_s, self._received = now_s, 0
        return slow


class Rate:
    """A limit over all connections and blobs of one transfer. What was not used is lost after a second."""

    def __init__(self, bytes_per_s: int, now_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = now_s

    def pause_s(self, received: int, now_s: float) -> float:
        """How long to wait after `received` bytes; 0 without a limit."""
        if not self._bytes_per_s:
            return 0.0
        self._free_s = max(self._free_s, now_s - 1.0) + received / self._bytes_per_s
        return max(0.0, self._free_s - now_s)
