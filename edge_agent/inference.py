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
from edge_contract.errors import (
    BundleRejected,
    DeviceUnfit,
    EdgewardError,
    Reason,
    StorageFault,
    TransferFailed,
)

_STATS_LIMIT_BYTES = 8 << 20
_DONE = 200
# The control loop waits so long; the other process answers these in milliseconds, if it lives.
_PATIENCE_S = 1.0
# Who is at fault, by the inference process's status; anything else may pass.
_KINDS: dict[int, type[EdgewardError]] = {
    400: DeviceUnfit,  # the store does not hold what it should
    404: DeviceUnfit,
    422: BundleRejected,
    501: DeviceUnfit,
    507: StorageFault,
}


class Loaded(NamedTuple):
    """One entry of the repository index."""

    name: str
    version: str
    digest: str
    ready: bool
    reason: Reason  # why it is not what the disk names; OK when it is
    form: str = ""  # which form of the model is in memory: see serving/loader.py
    detail: str = ""  # `reason` as one sentence


class InferenceClient:
    """Calls of one control socket. Stateless: each call is a connection of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lifeline(self) -> Lifeline:
        """For counting how often the process ends from now on."""
        return Lifeline(self._path)

    def index(self, timeout_s: float = _PATIENCE_S) -> list[Loaded]:
        """What is loaded. Raises TransferFailed when nobody answers."""
        try:
            return [
                Loaded(
                    e["name"],
                    e["version"],
                    e["digest"],
                    e["state"] == "READY",
                    Reason(e["reason"] or "ok"),
                    str(e.get("form", "")),
                    str(e.get("detail", "")),
                )
                for e in json.loads(self._answer("POST", "/v2/repository/index", timeout_s))
            ]
        except (ValueError, KeyError, TypeError) as e:
            raise _unreachable(f"its index is none: {e!r}") from e

    def load(self, name: str, digest: str | None, timeout_s: float, *, original: bool = False) -> None:
        """Make `digest` (None: what the disk names) serve as `name`; returns when new requests reach it.

        With `original` from the model of the bundle, also if it serves from another form already.
        When it does not load, the version before keeps serving. Raises BundleRejected, DeviceUnfit or
        StorageFault by who is at fault; TransferFailed when nobody answers or this is not the moment.
        """
        body = {"parameters": {"digest": digest, "original": original}}
        status, data = self._request("POST", f"/v2/repository/models/{name}/load", timeout_s, body)
        if status != _DONE:
            raise _refusal(status, data)

    def unload(self, name: str, timeout_s: float) -> None:
        """Stop serving `name`. Raises TransferFailed when nobody answers."""
        self._answer("POST", f"/v2/repository/models/{name}/unload", timeout_s)

    def stats(self, timeout_s: float = _PATIENCE_S) -> ServingStats:
        """Counts since load of every version. Raises TransferFailed when nobody answers."""
        data = self._answer("GET", "/edgeward/v1/stats", timeout_s)
        try:
            return canonical.from_bytes(data, ServingStats, limit_bytes=_STATS_LIMIT_BYTES)
        except canonical.DecodeFault as e:
            raise _unreachable(f"statistics: {e}") from e

    def _answer(self, method: str, path: str, timeout_s: float) -> bytes:
        status, data = self._request(method, path, timeout_s)
        if status != _DONE:
            raise _unreachable(f"status {status}")
        return data

    def _request(
        self, method: str, path: str, timeout_s: float, body: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        connection = _UnixConnection(self._path, timeout_s)
        try:
            connection.request(
                method, path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as e:
            raise _unreachable(str(e) or type(e).__name__) from e
        finally:
            connection.close()


class Lifeline:
    """A connection on which nothing is ever said: it breaks when the process that took it ends.

    So every end is seen, also of a process that lives too shortly to answer anything. While nobody takes
    it, it waits in the socket that a supervisor holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = self._connect()

    def broke(self) -> bool:
        """Whether the process has ended since the last call; does not block."""
        if self._socket is None:
            self._socket = self._connect()
            return False
        try:
            ended = self._socket.recv(1, socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            ended = True
        self.close()
        self._socket = self._connect()
        return ended

    def close(self) -> None:
        """Let go of it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket | None:
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError:  # too many open files
            return None
        try:
            connection.setblocking(False)  # a full backlog is no reason to wait
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            return None
        return connection


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
    """The inference process's error as the same error here."""
    kind = _KINDS.get(status)
    try:
        body = json.loads(data)
        reason, what, next_step = Reason(body["reason"]), str(body["what"]), str(body["next_step"])
    except (ValueError, KeyError, TypeError):
        kind = None
    return kind(reason, what, next_step) if kind else _unreachable(f"status {status}")
