"""uvicorn as this process uses it; the only file of the agent that imports uvicorn.

What differs from its defaults: malformed HTTP is answered in JSON as every other error is, request heads
are bounded, nothing ticks while nothing happens, and signals are the business of server.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edge_agent.serving.http import App
from edge_agent.serving.web import error_response
from edge_contract.errors import Reason, RequestRejected

_MAX_HEAD_BYTES = 64 << 10
_KEEP_ALIVE_S = 75


class Protocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Parse; a request head that does not end is cut off."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(431, f"the request's head has more than {_MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        """The head has ended."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_begin(self) -> None:
        """A new head begins."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - ours says more
        """The parser has given up on this connection."""
        self._refuse(400, "this is not a well-formed HTTP/1.1 request")

    def _refuse(self, status: int, what: str) -> None:
        error = RequestRejected(status, Reason.BAD_INPUT, what, "send HTTP/1.1 as its standard says")
        response = error_response(error)
        head = (
            f"HTTP/1.1 {status} {'Bad Request' if status == 400 else 'Request Header Fields Too Large'}\r\n"
            f"content-type: {response.content_type}\r\ncontent-length: {len(response.body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + response.body)
        self.transport.close()


class Server(uvicorn.Server):
    """Serves one app on given sockets until `stop`."""

    def __init__(self, app: App, drain_timeout_s: float) -> None:
        config = uvicorn.Config(
            cast(Any, app),
            http=Protocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,  # would cost a tick a second, from a clock that may be wrong
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
        )
        super().__init__(config)
        self.listening = asyncio.Event()
        self._stop = asyncio.Event()

    async def run_on(self, sockets: list[socket.socket]) -> None:
        """Serve until `stop`, then finish the requests under way and close the sockets."""
        await self.serve(sockets=sockets)

    def stop(self) -> None:
        """Accept nothing more, finish what is under way."""
        self.should_exit = True
        self._stop.set()

    async def main_loop(self) -> None:
        """Wait, instead of looking ten times a second."""
        self.listening.set()
        await self.on_tick(0)
        await self._stop.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: server.py has two of these in one process and handles signals for both."""
        yield
