"""systemd's notification protocol (sd_notify(3)), as far as the agent uses it. Silent off systemd.

A leaf module for both processes. Socket activation is not here: see serving/sockets.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"


def notify(message: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send `message` (`READY=1`, `STATUS=…`; lines joined by newlines) to the service manager.

    False where nobody listens: without NOTIFY_SOCKET, or when the manager is gone. That is no error,
    because a program must run the same without one.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        try:
            s.sendto(message.encode(), address)
        except OSError:
            return False
    return True


def watchdog_s(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float | None:
    """The watchdog's period in seconds if this process is watched, else None. Ping at half of it."""
    period = environ.get("WATCHDOG_USEC", "")
    watched = environ.get("WATCHDOG_PID", "")
    if not period.isdigit() or int(period) == 0:
        return None
    if watched and watched != str(os.getpid() if pid is None else pid):
        return None
    return int(period) / 1e6
