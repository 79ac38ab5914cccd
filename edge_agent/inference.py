"""The control process's side of the control socket: load, unload, index, statistics.

HTTP over a Unix socket with the standard library; it imports no runtime and no numpy.
"""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any, NamedTuple

from edge_agent.stats import ServingStats
from edge_contract import canonical
from edge_contract.errors import BundleRejected, EdgewardError, Reason, TransferFailed

_STATS_LIMIT_BYTES = 8 << 20


class Loaded(NamedTuple):
    """One entry of the repository index."""

    name: str
    version: str
    digest: str
    ready: bool
    reason: str


class InferenceClient:
    """Calls of one control socket. Stateless: each call is a connection of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def index(self, timeout_s: float = 2.0) -> list[Loaded]:
        """What is loaded. Raises TransferFailed when nobody answers."""
        entries = self._call("POST", "/v2/repository/index", {}, timeout_s)
        return [
            Loaded(
                str(e["name"]),
                str(e.get("version", "")),
                str(e.get("digest", "")),
                e.get("state") == "READY",
                str(e.get("reason", "")),
            )
            for e in entries
        ]

    def load(self, name: str, digest: str, timeout_s: float) -> None:
        """Make `digest` serve as `name`; returns when new requests reach it.

        Raises BundleRejected when it does not load (the version before keeps serving), TransferFailed
        when nobody answers.
        """
        self._call(
            "POST", f"/v2/repository/models/{name}/load", {"parameters": {"digest": digest}}, timeout_s
        )

    def unload(self, name: str, timeout_s: float) -> None:
        """Stop serving `name`."""
        self._call("POST", f"/v2/repository/models/{name}/unload", {}, timeout_s)

    def stats(self, timeout_s: float = 2.0) -> ServingStats:
        """Counts since load of every version. Raises TransferFailed when nobody answers."""
        data = self._request("GET", "/edgeward/v1/stats", None, timeout_s)
        try:
            return canonical.from_bytes(data, ServingStats, limit_bytes=_STATS_LIMIT_BYTES)
        except canonical.DecodeFault as e:
            raise _unreachable(f"statistics: {e}") from e

    def _call(self, method: str, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        data = self._request(method, path, json.dumps(body).encode(), timeout_s)
        return json.loads(data) if data else {}

    def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
        connection = _UnixConnection(self._path, timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise _unreachable(str(e) or type(e).__name__) from e
        finally:
            connection.close()
        if response.status >= 400:
            raise _refusal(response.status, data)
        return data


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _unreachable(detail: str) -> TransferFailed:
    return TransferFailed(
        Reason.SERVING_UNREACHABLE,
        f"the inference process does not answer ({detail})",
        "check edge-inference.service; its socket keeps requests waiting meanwhile",
    )


def _refusal(status: int, data: bytes) -> EdgewardError:
    try:
        body = json.loads(data)
        return BundleRejected(Reason(body["reason"]), str(body["error"]), str(body.get("next_step", "")))
    except (ValueError, KeyError, TypeError):
        return _unreachable(f"status {status}")
