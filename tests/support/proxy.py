"""A small HTTP proxy: absolute URLs and CONNECT, with a login if one is wanted. For tests alone."""

from __future__ import annotations

import base64
import select
import socket
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from tests.support.http_registry import _Running


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        if not self._let_in():
            return
        parts = urlsplit(self.path)
        upstream = HTTPConnection(parts.hostname or "", parts.port or 80, timeout=5)
        kept = {n: v for n, v in self.headers.items() if n.lower() not in ("proxy-authorization", "host")}
        upstream.request("GET", parts.path, headers=kept)
        answer = upstream.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        upstream.close()

    def do_CONNECT(self) -> None:
        if not self._let_in():
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as upstream:
            self.send_response(200)
            self.end_headers()
            self._pump(upstream)
        self.close_connection = True

    def _pump(self, upstream: socket.socket) -> None:
        ends = {self.connection: upstream, upstream: self.connection}
        while True:
            for ready in select.select(list(ends), [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                ends[ready].sendall(data)

    def _let_in(self) -> bool:
        proxy = self.server.proxy  # type: ignore[attr-defined]
        proxy.asked.append(self.path)
        wanted = "Basic " + base64.b64encode(proxy.login.encode()).decode() if proxy.login else None
        if wanted is None or self.headers.get("Proxy-Authorization") == wanted:
            return True
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False


class Proxy(_Running):
    """`asked` are the URLs and hosts it was asked for; `login` is `user:password`."""

    handler = _Handler

    def __init__(self, login: str = "") -> None:
        super().__init__()
        self.login = login
        self.asked: list[str] = []

    def start(self) -> None:
        super().start()
        self._server.proxy = self  # type: ignore[union-attr]

    def __enter__(self) -> Proxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
