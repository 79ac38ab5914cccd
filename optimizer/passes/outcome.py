"""Pure: what became of one pass. Apart from the passes, so that reading it needs no ONNX."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Status = Literal["applied", "not needed", "dropped"]


class PassOutcome(Struct, frozen=True, forbid_unknown_fields=True):
    """What became of one pass, and why."""

    name: str
    status: Status
    detail: str = ""
