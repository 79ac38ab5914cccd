"""An inference process as the control process sees one: the control socket, without a runtime behind it.

It implements the same requests as `edge-agent serve` and keeps the same promises (the version before
serves until a load has succeeded). What goes wrong is scripted.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from msgspec.structs import replace

from edge_agent.layout import Layout
from edge_agent.stats import ServingStats, VersionStats, empty_latency
from edge_contract import canonical, manifest
from edge_contract.errors import Reason


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        status, value = server.double.answer(self.path, json.loads(body or b"{}"))
        data = value if isinstance(value, bytes) else canonical.to_bytes(value)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    double: InferenceDouble

    def __init__(self, path: str) -> None:
        self.open: list[socket.socket] = []
        super().__init__(path, _Handler)

    def get_request(self) -> tuple[socket.socket, str]:
        connection, address = super().get_request()
        self.open.append(connection)
        return connection, address

    def hang_up(self) -> None:
        """End all connections, as the end of a process does."""
        for connection in self.open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.open.clear()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up."""


@dataclass
class InferenceDouble:
    """`loaded`: name → digest. `refuse`: (status, reason) by digest. `calls`: every load and unload."""

    layout: Layout
    loaded: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Reason] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    refuse: dict[str, tuple[int, Reason]] = field(default_factory=dict)
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    counts: dict[str, VersionStats] = field(default_factory=dict)
    instead: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    pid: int = 100
    load_s: float = 0.0
    _server: _Server | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen on the layout's control socket."""
        self.layout.run.mkdir(parents=True, exist_ok=True)
        self.layout.control_socket.unlink(missing_ok=True)
        self._server = _Server(str(self.layout.control_socket))
        self._server.double = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Be gone: connections are refused."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.hang_up()
            self._server.server_close()
            self._thread.join()
            self._server = self._thread = None
        self.layout.control_socket.unlink(missing_ok=True)

    def restart(self) -> None:
        """Another process: its counts begin anew, and connections that the old one had taken end."""
        time.sleep(0.03)  # in which it takes those that wait
        self.pid += 1
        self.counts.clear()
        if self._server is not None:
            self._server.hang_up()

    def count(
        self, digest: str, requests: int, *, errors: int = 0, non_finite: int = 0, loaded_ms: int = 1
    ) -> None:
        """Let a version have answered so many requests, all in a millisecond."""
        latency = empty_latency()
        latency[15] = requests
        stats = self._stats(self._name(digest), digest)
        self.counts[digest] = replace(
            stats,
            loaded_ms=loaded_ms,
            requests=requests,
            errors=errors,
            non_finite=non_finite,
            latency_counts=latency,
        )

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """One request."""
        if path in self.instead:
            return self.instead[path]
        match path.strip("/").split("/"):
            case ["v2", "repository", "index"]:
                return 200, [self._entry(name, digest) for name, digest in sorted(self.loaded.items())]
            case ["edgeward", "v1", "stats"]:
                versions = [self._stats(n, d) for n, d in sorted(self.loaded.items())]
                return 200, ServingStats(self.pid, 1, versions)
            case ["v2", "repository", "models", name, "unload"]:
                self.calls.append(("unload", name, ""))
                self.loaded.pop(name, None)
                return 200, {}
            case ["v2", "repository", "models", name, "load"]:
                digest = body["parameters"]["digest"] or self.layout.current(name).readlink().name
                answer = self._load(name, digest)
                if answer[0] == 200:
                    self.forms[name] = "original" if body["parameters"].get("original") else ""
                return answer
        return 404, {"error": path, "what": path, "reason": "not_found", "next_step": ""}

    def _load(self, name: str, digest: str) -> tuple[int, Any]:
        self.calls.append(("load", name, digest))
        time.sleep(self.load_s)
        if digest in self.refuse:
            status, reason = self.refuse[digest]
            return status, {"error": "no", "what": "it does not", "reason": reason.value, "next_step": "try"}
        self.loaded[name] = digest
        self.notes.pop(name, None)
        return 200, {"name": name, "version": self._version(digest), "digest": digest}

    def _entry(self, name: str, digest: str) -> dict[str, str]:
        note = self.notes.get(name)
        return {
            "name": name,
            "version": self._version(digest),
            "state": "READY",
            "reason": note.value if note else "",
            "detail": "",
            "digest": digest,
            "form": self.forms.get(name, ""),
        }

    def _stats(self, name: str, digest: str) -> VersionStats:
        known = self.counts.get(digest)
        return known or VersionStats(name, self._version(digest), digest, 1, 0, 0, 0, empty_latency(), {})

    def _version(self, digest: str) -> str:
        return self._manifest(digest).version

    def _name(self, digest: str) -> str:
        return self._manifest(digest).name

    def _manifest(self, digest: str) -> manifest.Manifest:
        return manifest.from_bytes((Path(self.layout.version(digest)) / "manifest.json").read_bytes())

    def __enter__(self) -> InferenceDouble:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
