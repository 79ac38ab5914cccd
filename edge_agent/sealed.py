"""Small state files with a seal: canonical JSON, a line feed, the SHA-256 of the JSON.

A flipped bit in JSON can be JSON again that says something else: another generation, another name. The
seal tells. It guards against a failing disk, not against whoever can write here. A file without a seal is
one that an earlier agent wrote, and is believed as it was then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from edge_agent import files
from edge_contract import canonical
from edge_contract.errors import StorageFault

T = TypeVar("T")


class Damaged(NamedTuple):
    """What was wrong with a file and where it is now, as the end of a sentence."""

    what: str


def write(path: Path, value: Any) -> None:
    """Replace `path` durably. Raises StorageFault and leaves the file before."""
    data = canonical.to_bytes(value)
    files.write(path, data + b"\n" + canonical.sha256_hex(data).encode())


def read(path: Path, kind: type[T]) -> T | None:
    """The value, or None when there is no file. Raises DecodeFault, or StorageFault when it is unreadable."""
    data = files.read(path)
    if data is None:
        return None
    body, line_feed, seal = data.partition(b"\n")
    if line_feed and seal != canonical.sha256_hex(body).encode():
        raise canonical.DecodeFault("$", "the seal is broken")
    return canonical.from_bytes(body, kind)


def read_or_set_aside(path: Path, kind: type[T], now_ms: int) -> T | Damaged | None:
    """The value, None, or what was wrong; a damaged file is renamed. Raises StorageFault when unreadable."""
    try:
        return read(path, kind)
    except canonical.DecodeFault as e:
        try:
            return Damaged(f"was damaged ({e}) and set aside as {files.set_aside(path, now_ms).name}")
        except StorageFault as fault:
            return Damaged(f"was damaged ({e}) and cannot be set aside: {fault.what}")
