"""urllib3's connections, each shown to a watchdog: when it is made, and when it is used again."""

from __future__ import annotations

import socket
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from edge_agent.update.watchdog import Watchdog


def watched(manager: urllib3.PoolManager, watchdog: Watchdog) -> urllib3.PoolManager:
    """`manager`, which has made no connection yet, under the eyes of `watchdog`.

    A new one is shown as it is before TLS and a proxy's answer, for these may drip as well.
    """

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            made = super()._new_conn()
            watchdog.watch(made)
            return made

        def request(self, *args: Any, **options: Any) -> None:
            if self.sock is not None:
                watchdog.watch(self.sock)
            super().request(*args, **options)

    class Secure(Plain, HTTPSConnection):
        """The same over TLS."""

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
    return manager
