"""Pure: the maintenance window, a time of day: `01:00-05:00`, `22:30-04:00 UTC`. It reads no clock.

Without `UTC` it is the device's local time, because that is when nobody works there. Through a change of
daylight-saving time a wait may be an hour off; whoever waits looks again.
"""

from __future__ import annotations

from typing import NamedTuple

_DAY_S = 86400


class Window(NamedTuple):
    """From `start_s` to `end_s`, seconds of the day; over midnight when the end is the smaller one."""

    start_s: int
    end_s: int
    utc: bool


def parse(text: str) -> Window | None:
    """What a checked configuration says; None for empty: no window, always open."""
    if not text:
        return None
    span, _, zone = text.partition(" ")
    start, _, end = span.partition("-")
    return Window(_seconds(start), _seconds(end), zone == "UTC")


def opens_in_s(window: Window, second_of_day: int) -> int:
    """Seconds until it opens; 0 while it is open. A window that ends where it begins is open all day."""
    length_s = (window.end_s - window.start_s) % _DAY_S or _DAY_S
    since_s = (second_of_day - window.start_s) % _DAY_S
    return 0 if since_s < length_s else _DAY_S - since_s


def _seconds(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 3600 + int(minutes) * 60
