"""Pure: what decoding requests (decode.py) and encoding responses (encode.py) share."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NoReturn

from edge_agent.serving.tensors import Array
from edge_contract.errors import Reason, RequestRejected

# The binary form of a BYTES element: its length in 4 bytes, little-endian, then itself.
BYTES_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Request:
    """A decoded inference request: arrays by input name, and which outputs to return (name → binary?)."""

    id: str | None
    inputs: dict[str, Array]
    wanted: dict[str, bool]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A response's body. `header_length` is the JSON part's, when binary tensors follow it."""

    body: bytes
    header_length: int | None


def reject(what: str, next_step: str, *, reason: Reason = Reason.BAD_TENSOR) -> NoReturn:
    """The request is at fault (400)."""
    raise RequestRejected(400, reason, what, next_step)
