"""Pure: what an update needs on the disk, and what may go to make room for it."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import NamedTuple


class Leftover(NamedTuple):
    """A file in the staging folder: its name, its age (since it was last wanted) and the disk it takes."""

    name: str
    age_s: float
    allocated_bytes: int

    @property
    def sha256(self) -> str:
        """The blob that it is, or is a part of."""
        return self.name.partition(".")[0]


def free_bytes_needed(missing: Iterable[tuple[int, int]], reserve_bytes: int) -> int:
    """What must be free for blobs of (size, what the staging folder already takes for it)."""
    return sum(max(0, size - allocated) for size, allocated in missing) + reserve_bytes


def outdated(found: Iterable[Leftover], keep: Set[str], keep_s: float) -> list[str]:
    """Names of leftovers that nobody has wanted for `keep_s`; blobs of `keep` are wanted now."""
    return [f.name for f in found if f.sha256 not in keep and f.age_s > keep_s]


def victims(found: Iterable[Leftover], keep: Set[str], lacking_bytes: int) -> list[str]:
    """Names of leftovers that make room for `lacking_bytes`, longest unwanted first; all if that is too few.

    What is whole goes after the parts of the same age: it may have come by hand.
    """
    chosen: list[str] = []
    by_age = sorted((f for f in found if f.sha256 not in keep), key=lambda f: (f.name == f.sha256, -f.age_s))
    for leftover in by_age:
        if lacking_bytes <= 0:
            break
        chosen.append(leftover.name)
        lacking_bytes -= leftover.allocated_bytes
    return chosen
