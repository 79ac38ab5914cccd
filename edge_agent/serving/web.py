"""HTTP requests and answers over raw ASGI: bodies with bounds, JSON, and errors as clients see them.

It knows no route and no model; http.py does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec

from edge_contract import canonical
from edge_contract.errors import (
    BundleRejected,
    DeviceUnfit,
    EdgewardError,
    InputRejected,
    Reason,
    RequestRejected,
    StorageFault,
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
T = TypeVar("T")

JSON = "application/json"
_STATUS: dict[type[EdgewardError], int] = {
    InputRejected: 400,
    BundleRejected: 422,
    DeviceUnfit: 501,
    StorageFault: 507,
}


class Response(NamedTuple):
    """A whole answer."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class ClientGone(Exception):
    """The client closed the connection before its request was whole; nobody reads an answer."""


@dataclass(slots=True)
class Request:
    """One HTTP request whose body has not been read. `body_timeout_s` bounds how long that may take."""

    scope: Scope
    receive: Receive
    body_timeout_s: float

    def header(self, name: str) -> str | None:
        """The first header of that lower-case name."""
        wanted = name.encode()
        return next((v.decode("latin-1") for k, v in self.scope["headers"] if k == wanted), None)

    async def body(self, limit_bytes: int) -> bytes:
        """The whole body. Raises RequestRejected (408, 413, 415) or ClientGone."""
        encoding = self.header("content-encoding") or "identity"
        if encoding != "identity":
            raise RequestRejected(
                415, Reason.BAD_INPUT, f"the body is {encoding}-encoded", "send it without Content-Encoding"
            )
        _check_size(int(self.header("content-length") or 0), limit_bytes)
        try:
            async with asyncio.timeout(self.body_timeout_s):
                return await self._read(limit_bytes)
        except TimeoutError as e:
            raise RequestRejected(
                408,
                Reason.DEADLINE_EXCEEDED,
                f"the body was not whole after {self.body_timeout_s:g} s",
                "send it faster, or smaller",
            ) from e

    async def _read(self, limit_bytes: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunks.append(message["body"])
            size += len(chunks[-1])
            _check_size(size, limit_bytes)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def json_response(value: Any) -> Response:
    """200 with JSON."""
    return Response(200, msgspec.json.encode(value))


def error_response(error: EdgewardError) -> Response:
    """An error as clients see it: `error` is the sentence with its next step, `reason` a stable code."""
    status = error.status if isinstance(error, RequestRejected) else _STATUS.get(type(error), 500)
    body = {
        "error": f"{error.what} → {error.next_step}",
        "what": error.what,
        "reason": error.reason.value,
        "next_step": error.next_step,
    }
    headers: tuple[tuple[str, str], ...] = ()
    if isinstance(error, RequestRejected) and error.retry_after_s is not None:
        headers = (("retry-after", str(error.retry_after_s)),)
    return Response(status, msgspec.json.encode(body), JSON, headers)


def decode(body: bytes, kind: type[T]) -> T:
    """A small JSON body, strictly; an empty one stands for `{}`. Raises RequestRejected (400)."""
    try:
        return canonical.from_bytes(body or b"{}", kind)
    except canonical.DecodeFault as e:
        raise RequestRejected(
            400, Reason.BAD_INPUT, f"the body: {e.problem} at {e.path}", "send what the protocol describes"
        ) from e


async def send_response(send: Send, response: Response) -> None:
    """Send it whole."""
    headers = [
        (b"content-type", response.content_type.encode()),
        (b"content-length", str(len(response.body)).encode()),
        *((k.encode(), v.encode()) for k, v in response.headers),
    ]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


def _check_size(size: int, limit_bytes: int) -> None:
    if size > limit_bytes:
        raise RequestRejected(
            413,
            Reason.BODY_TOO_LARGE,
            f"the body has {size} bytes or more, the limit is {limit_bytes}",
            "send smaller batches, or raise serving.max_body_bytes",
        )
