"""A floor on the disk: a value in two copies, each with its digest, so that a damaged one loses nothing.

One process writes a floor (the fetch child that of metadata, the control process that of orders); others
may read it at any time. What the values mean and when they rise is in levels.py.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from msgspec import Struct

from edge_agent import files
from edge_agent.layout import Layout
from edge_agent.update.levels import MetadataFloor, OrderFloor
from edge_contract import canonical
from edge_contract.errors import StorageFault

T = TypeVar("T", MetadataFloor, OrderFloor)
_LIMIT_BYTES = 16 << 20  # a role takes some 150 bytes: room for a hundred thousand hash bins


class _Copy(NamedTuple, Generic[T]):
    """One copy as it was found: its number among all writes and its value, or what is wrong with it."""

    number: int = 0
    value: T | None = None
    problem: str = ""
    fault: StorageFault | None = None


class _Body(Struct, frozen=True, forbid_unknown_fields=True):
    number: int
    value: dict[str, Any]


class Floor(Generic[T]):
    """One value, and what was wrong with its copies when they were read."""

    def __init__(self, paths: tuple[Path, Path], empty: T, *, patient: bool = False) -> None:
        """Reads, and repairs nothing. Raises StorageFault only when the disk gives no copy at all.

        A patient one does not: its value is empty then, and `known` asks the disk again.
        """
        self._paths = paths
        self._empty: T = empty
        self.value: T = empty
        self.problems: list[str] = []
        self._number = 0
        self._both = False
        self._read_once = False
        with suppress(*[StorageFault] if patient else []):
            self.read()

    def known(self) -> T:
        """The value. Raises StorageFault while the disk does not give it."""
        if not self._read_once:
            self.read()
        return self.value

    def read(self) -> None:
        """Look at the disk again."""
        copies = [_read(path, self._empty) for path in self._paths]
        # Each write holds all that was there before, so the last one that is whole is the highest.
        newest = max(copies, key=lambda c: c.number)
        if newest.value is None and (fault := next((c.fault for c in copies if c.fault), None)):
            raise fault  # it may be readable later: starting from nothing would lower the floor
        self._read_once = True
        self.value = self._empty if newest.value is None else newest.value
        self._number = newest.number
        self._both = all(c.value is not None and c.number == newest.number for c in copies)
        self.problems = [c.problem for c in copies if c.problem]
        if newest.value is not None or self.problems:
            gone = [p for p, c in zip(self._paths, copies, strict=True) if c == _Copy()]
            self.problems += [f"{path} is missing" for path in gone]

    def repair(self) -> None:
        """Write damaged and missing copies anew. Raises StorageFault."""
        if not self._both and (self.problems or self._number):
            self._write(self.value)

    def raise_to(self, value: T) -> None:
        """Make `value` durable in both copies, if it is another one. Raises StorageFault."""
        if value != self.value or not self._both:
            self._write(value)

    def _write(self, value: T) -> None:
        self.known()  # what is unread may be higher
        body = canonical.to_bytes({"number": self._number + 1, "value": value})
        data = canonical.sha256_hex(body).encode() + b"\n" + body
        self._both = False
        for path in self._paths:
            files.make_folder(path.parent)
            if path.is_dir():
                files.remove_tree(path)
            files.write(path, data)
        self._number, self._both, self.value = self._number + 1, True, value


def metadata_floor(layout: Layout) -> Floor[MetadataFloor]:
    """The floor of what the registry has signed."""
    return Floor(layout.floor_copies("metadata"), MetadataFloor())


def order_floor(layout: Layout) -> Floor[OrderFloor]:
    """The floor of what this device was told and has done."""
    return Floor(layout.floor_copies("orders"), OrderFloor(), patient=True)


def _read(path: Path, empty: T) -> _Copy[T]:
    if path.is_dir():
        return _Copy(problem=f"{path} is a folder")
    try:
        data = files.read(path)
    except StorageFault as e:
        return _Copy(problem=e.what, fault=e)
    if data is None:
        return _Copy()
    digest, _, body = data.partition(b"\n")
    if canonical.sha256_hex(body).encode() != digest:
        return _Copy(problem=f"{path} is damaged: its content is not what its digest says")
    try:
        found = canonical.from_bytes(body, _Body, limit_bytes=_LIMIT_BYTES)
        return _Copy(found.number, canonical.from_builtins(found.value, type(empty)))
    except canonical.DecodeFault as e:
        return _Copy(problem=f"{path} cannot be used: {e}")
