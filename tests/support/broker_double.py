"""An MQTT 5 broker for what mosquitto cannot be made to do: chosen reason codes, silence, a polite takeover.

It speaks the real wire to one client at a time: CONNECT, SUBSCRIBE, PUBLISH at QoS 1, PINGREQ, DISCONNECT.
It keeps no sessions and routes nothing: the test reads what came and says what to answer.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

CONNECT, CONNACK, PUBLISH, PUBACK = 1, 2, 3, 4
SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = 8, 9, 12, 13, 14


class Published(NamedTuple):
    """A publication of the client."""

    topic: str
    payload: bytes
    dup: bool
    mid: int


class BrokerDouble:
    """`code(publication)` is the reason code of its PUBACK; None gives no answer at all."""

    def __init__(self, code: Callable[[Published], int | None] = lambda _: 0) -> None:
        self.code = code
        self.published: list[Published] = []
        self.connects = 0
        self.connect_packets: list[bytes] = []
        self.clean = 0
        self.granted = 1
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        number: int = self._listener.getsockname()[1]
        return number

    def on(self, topic: str) -> list[Published]:
        """What came on a topic so far."""
        return [p for p in self.published if p.topic == topic]

    def publish(self, topic: str, payload: bytes, *, dup: bool = False, mid: int = 1) -> None:
        """A message to the client."""
        name = topic.encode()
        body = len(name).to_bytes(2, "big") + name + mid.to_bytes(2, "big") + b"\0" + payload
        self._send(PUBLISH, body, flags=0x02 | (0x08 if dup else 0))

    def rubbish(self, kind: int, body: bytes, flags: int = 0) -> None:
        """A packet that may be none."""
        self._send(kind, body, flags)

    def disconnect(self, code: int) -> None:
        """End the session with a reason."""
        self._send(DISCONNECT, bytes([code, 0]))
        self._drop()

    def __enter__(self) -> BrokerDouble:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._drop()
        self._thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                self._connection, _ = self._listener.accept()
            except OSError:
                return
            with self._connection, suppress(OSError, EOFError):
                stream = self._connection.makefile("rb")
                with stream:
                    while True:
                        self._answer(*_packet(stream.read))

    def _answer(self, kind: int, flags: int, body: bytes) -> None:
        match kind:
            case 1:
                self.connects += 1
                self.connect_packets.append(body)
                self._send(CONNACK, b"\0\0\0")
            case 3:
                self._take(flags, body)
            case 8:
                filters = _filters(body)
                self._send(SUBACK, body[:2] + b"\0" + bytes([self.granted]) * filters)
            case 12:
                self._send(PINGRESP, b"")
            case 14:
                self.clean += 1
                raise EOFError

    def _take(self, flags: int, body: bytes) -> None:
        end = 2 + int.from_bytes(body[:2], "big")
        topic, mid = body[2:end].decode(), int.from_bytes(body[end : end + 2], "big")
        properties, size = _varint(body[end + 2 :])
        found = Published(topic, body[end + 2 + size + properties :], bool(flags & 8), mid)
        self.published.append(found)
        code = self.code(found)
        if code is not None:
            self._send(PUBACK, mid.to_bytes(2, "big") + bytes([code, 0]))

    def _send(self, kind: int, body: bytes, flags: int = 0) -> None:
        length, size = b"", len(body)
        while True:
            size, digit = divmod(size, 128)
            length += bytes([digit | (128 if size else 0)])
            if not size:
                break
        with self._lock:
            assert self._connection is not None
            self._connection.sendall(bytes([kind << 4 | flags]) + length + body)

    def _drop(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)


def _packet(read: Callable[[int], bytes]) -> tuple[int, int, bytes]:
    def exactly(count: int) -> bytes:
        data = read(count)
        if len(data) < count:
            raise EOFError
        return data

    head = exactly(1)[0]
    size = shift = 0
    while True:
        digit = exactly(1)[0]
        size |= (digit & 127) << shift
        shift += 7
        if digit < 128:
            return head >> 4, head & 15, exactly(size)


def _varint(data: bytes) -> tuple[int, int]:
    """(value, bytes it takes)."""
    value = shift = 0
    for count, digit in enumerate(data, 1):
        value |= (digit & 127) << shift
        shift += 7
        if digit < 128:
            return value, count
    raise EOFError


def _filters(body: bytes) -> int:
    """How many filters a SUBSCRIBE has."""
    properties, size = _varint(body[2:])
    at, count = 2 + size + properties, 0
    while at < len(body):
        at += 2 + int.from_bytes(body[at : at + 2], "big") + 1
        count += 1
    return count
