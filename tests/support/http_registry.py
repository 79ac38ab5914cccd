"""A real HTTP server that answers as it is told: what a registry, a proxy or a bad network may do.

`ScriptedServer` answers request after request from a list. `FolderServer` serves a registry's folder and
can be slow, absent, or wrong on single paths. Both are threads of this process on a loopback port.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

_CHUNK_BYTES = 8 << 10


class Seen(NamedTuple):
    """One request as it came."""

    path: str
    range: str | None
    if_range: str | None
    cache_control: str | None = None
    authorization: str | None = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    extra: Mapping[str, str] = {}

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        server.answer(self)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: failures are what the tests look at."""

    @property
    def seen(self) -> Seen:
        """The request."""
        names = ("Range", "If-Range", "Cache-Control", "Authorization")
        return Seen(self.path, *(self.headers.get(name) for name in names))

    def head(self, status: int, length: int | None, **headers: str) -> None:
        """Status line and headers."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in {**headers, **self.extra}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def offset(self) -> int:
        """The first byte that is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(asked.group(1)) if asked else 0

    def cut_off(self) -> None:
        """Close the connection as a broken network does."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


Answer = Callable[[_Handler], None]


def whole(body: bytes) -> Answer:
    """The body, or from the offset that is asked for, as a static web server does."""

    def answer(request: _Handler) -> None:
        start = request.offset()
        if start >= len(body) > 0:
            request.head(416, 0, Content_Range=f"bytes */{len(body)}")
        elif start:
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            request.head(206, len(body) - start, Content_Range=span)
            request.wfile.write(body[start:])
        else:
            request.head(200, len(body))
            request.wfile.write(body)

    return answer


def whole_always(body: bytes) -> Answer:
    """200 with everything, whatever range is asked for."""

    def answer(request: _Handler) -> None:
        request.head(200, len(body))
        request.wfile.write(body)

    return answer


def span(body: bytes, start: int, total: int | None = None) -> Answer:
    """206 with the part from `start` on, whatever is asked for; `total` is the length it claims."""

    def answer(request: _Handler) -> None:
        text = f"bytes {start}-{len(body) - 1}/{len(body) if total is None else total}"
        request.head(206, len(body) - start, Content_Range=text)
        request.wfile.write(body[start:])

    return answer


def tagged(answer: Answer, tag: str) -> Answer:
    """The answer under an entity tag."""
    return with_headers(answer, ETag=tag)


def with_headers(answer: Answer, **headers: str) -> Answer:
    """The answer with more headers, `_` for `-`."""

    def more(request: _Handler) -> None:
        request.extra = headers
        try:
            answer(request)
        finally:
            request.extra = {}

    return more


def redirect(target: str, code: int = 302) -> Answer:
    """To another address."""
    return lambda request: request.head(code, 0, Location=target)


def drip(body: bytes, bytes_per_s: float) -> Answer:
    """Byte for byte, slowly, until the client has had enough."""

    def answer(request: _Handler) -> None:
        start = request.offset()
        headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        request.head(206 if start else 200, len(body) - start, **headers)
        try:
            for at in range(start, len(body)):
                request.wfile.write(body[at : at + 1])
                time.sleep(1 / bytes_per_s)
        except OSError:
            request.close_connection = True

    return answer


def drip_head(pause_s: float, begun: bytes = b"HTTP/1.1 200 OK\r\nX-Long: ") -> Answer:
    """A line of the head that never ends, byte for byte, until the client has had enough."""

    def answer(request: _Handler) -> None:
        request.close_connection = True
        with suppress(OSError):
            request.connection.sendall(begun)
            while True:
                request.connection.sendall(b"a")
                time.sleep(pause_s)

    return answer


def cut(body: bytes, after: int) -> Answer:
    """Promises the rest of the body and ends after `after` more bytes."""

    def answer(request: _Handler) -> None:
        start = request.offset()
        headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        request.head(206 if start else 200, len(body) - start, **headers)
        request.wfile.write(body[start : start + after])
        request.cut_off()

    return answer


def endless(body: bytes) -> Answer:
    """The body and then more, without a length."""

    def answer(request: _Handler) -> None:
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        try:
            request.wfile.write(body)
            while True:
                request.wfile.write(b"more" * 1000)
        except OSError:
            request.close_connection = True

    return answer


def status(code: int, **headers: str) -> Answer:
    """A refusal with a body that nobody reads."""

    def answer(request: _Handler) -> None:
        request.head(code, 5, **headers)
        request.wfile.write(b"sorry")

    return answer


def hang_up(request: _Handler) -> None:
    """Closes the connection instead of answering."""
    request.cut_off()


def stall(seconds: float) -> Answer:
    """Says nothing for a while, then hangs up."""

    def answer(request: _Handler) -> None:
        time.sleep(seconds)
        request.cut_off()

    return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    answer: Answer

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what some tests want."""


class _Running:
    """A server that can go away and come back on the same port; over TLS with `tls`, certificate and key."""

    handler: type[BaseHTTPRequestHandler] = _Handler

    def __init__(self) -> None:
        self.tls: tuple[Path, Path] | None = None
        self.client_ca: Path | None = None
        self.seen: list[Seen] = []
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Its URL, also while it is away."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen; on the port of before if there was one."""
        self._server = _Server(("127.0.0.1", self._port), self.handler)
        self._port = self._server.server_address[1]
        if self.tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.tls)
            context.set_alpn_protocols(["http/1.1"])
            if self.client_ca is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self.client_ca)
            # The handshake belongs to the connection's thread, not to the one that accepts.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._server.answer = self._record
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        self._server = self._thread = None

    def die(self) -> None:
        """Go away in the middle of what it is sending."""
        if self._server is not None:
            for connection in list(self._server.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.stop()

    def answer(self, request: _Handler) -> None:
        """Answer one request."""
        raise NotImplementedError

    def _record(self, request: _Handler) -> None:
        self.seen.append(request.seen)
        self.answer(request)


class ScriptedServer(_Running):
    """Answers from `script`, one entry a request; the last one again and again."""

    def __init__(self, *script: Answer) -> None:
        super().__init__()
        self.script = list(script)
        self._lock = threading.Lock()

    def answer(self, request: _Handler) -> None:
        with self._lock:
            answer = self.script[0] if len(self.script) == 1 else self.script.pop(0)
        answer(request)

    def __enter__(self) -> ScriptedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class FolderServer(_Running):
    """A registry's folder over HTTP, with Range.

    `rate_bytes_per_s` slows every body down (0: not); `instead` maps paths to other answers.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.rate_bytes_per_s = 0
        self.instead: dict[str, Answer] = {}

    def answer(self, request: _Handler) -> None:
        path = request.path.lstrip("/")
        if path in self.instead:
            self.instead[path](request)
            return
        file = (self.folder / path).resolve()
        if not (file.is_relative_to(self.folder.resolve()) and file.is_file()):
            status(404)(request)
        elif self.rate_bytes_per_s:
            self._slowly(request, file.read_bytes())
        else:
            whole(file.read_bytes())(request)

    def _slowly(self, request: _Handler, body: bytes) -> None:
        start = request.offset()
        headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        request.head(206 if start else 200, len(body) - start, **headers)
        for at in range(start, len(body), _CHUNK_BYTES):
            chunk = body[at : at + _CHUNK_BYTES]
            request.wfile.write(chunk)
            if self.rate_bytes_per_s:
                time.sleep(len(chunk) / self.rate_bytes_per_s)

    def __enter__(self) -> FolderServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
