"""Pure: names of signals, for sentences about processes that were ended by one."""

from __future__ import annotations

import signal


def signal_name(number: int) -> str:
    """`SIGKILL`; real-time signals have only a number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
