"""Pure: what never sinks on a device: versions of metadata, the registry's time, releases, generations.

python-tuf keeps such levels only in the metadata files themselves, which a disk can lose. These are kept
beside them, by floor.py. Nothing here comes from the local clock: a level that a wrong clock had raised
could never be lowered again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct
from msgspec.structs import replace

from edge_contract.manifest import Count, Name

ROOT = "root"
TIMESTAMP = "timestamp"
SNAPSHOT = "snapshot"
Version = Annotated[int, Meta(ge=1)]


class Level(Struct, frozen=True, forbid_unknown_fields=True):
    """The highest version of a role, and the ids of the keys whose signatures on it were verified."""

    version: Version
    signers: list[str]


class SignedTime(Struct, frozen=True, forbid_unknown_fields=True):
    """When the registry signed the newest timestamp seen (Unix seconds), and the ids of the keys that did."""

    at_s: Count
    signers: list[str]


class MetadataFloor(Struct, frozen=True, forbid_unknown_fields=True):
    """What the fetch child has verified: per role a level, and the registry's time."""

    schema: Literal[1] = 1
    roles: dict[str, Level] = {}
    time: SignedTime | None = None

    @property
    def at_s(self) -> int:
        """The registry's time in Unix seconds; 0 while none is known."""
        return self.time.at_s if self.time else 0


class OrderFloor(Struct, frozen=True, forbid_unknown_fields=True):
    """What the control process has accepted and committed: a generation, the highest release per model."""

    schema: Literal[1] = 1
    generation: Count = 0
    releases: dict[Name, Count] = {}


class Holders(NamedTuple):
    """Who may sign a role now, by the word of one delegator: key ids, and how many of them it takes."""

    keyids: frozenset[str]
    threshold: int


class Seen(NamedTuple):
    """A role as it was just verified. `signed_at_s` is the timestamp's own word, None for other roles."""

    role: str
    version: int
    signers: frozenset[str]
    holders: tuple[Holders, ...]
    signed_at_s: int | None = None


class Below(NamedTuple):
    """A role came in an older version than this device has verified before."""

    role: str
    version: int
    floor: int


def stands(signers: Iterable[str], holders: Iterable[Holders]) -> bool:
    """Whether what `signers` signed would still be believed.

    When a role's keys are rotated away, what they signed no longer binds: whoever stole them may have
    signed an absurdly high version or time, and the rotation is the way out (fast-forward recovery in
    section 5.3.11 of the TUF specification). The root's own level always binds.
    """
    return any(len(holder.keyids & set(signers)) >= holder.threshold for holder in holders)


def judge(floor: MetadataFloor, seen: Iterable[Seen]) -> Below | None:
    """The first role that is below its floor."""
    seen = list(seen)
    roles = _binding(floor, seen)
    for item in seen:
        level = roles.get(item.role)
        if level is not None and item.version < level.version:
            return Below(item.role, item.version, level.version)
    return None


def raised(floor: MetadataFloor, seen: Iterable[Seen]) -> MetadataFloor:
    """The floor after `seen`. What is below it changes nothing."""
    seen = list(seen)
    roles, time = _binding(floor, seen), floor.time
    for item in seen:
        level = roles.get(item.role)
        if level is None or item.version > level.version:
            roles[item.role] = Level(item.version, sorted(item.signers))
        if item.role == TIMESTAMP:
            time = _later(time, item)
    return replace(floor, roles=roles, time=time)


def with_time(floor: MetadataFloor, time: SignedTime | None) -> MetadataFloor:
    """The floor with another time; none, once the keys that vouched for it are no longer trusted."""
    return replace(floor, time=time)


def now_s(clock_s: float, floor: MetadataFloor) -> float:
    """The time for decisions on expiry: it can be no earlier than the registry's last signature."""
    return max(clock_s, floor.at_s)


def behind_s(clock_s: float, floor: MetadataFloor) -> float:
    """By how much this device's clock is certainly behind; 0 when it may be right."""
    return max(0.0, floor.at_s - clock_s)


def with_generation(floor: OrderFloor, generation: int) -> OrderFloor:
    """After a desired state was accepted."""
    return replace(floor, generation=max(floor.generation, generation))


def with_releases(floor: OrderFloor, releases: Mapping[str, int]) -> OrderFloor:
    """After versions of these releases were committed."""
    higher = {name: max(release, floor.releases.get(name, 0)) for name, release in releases.items()}
    return replace(floor, releases=floor.releases | higher)


def _binding(floor: MetadataFloor, seen: Iterable[Seen]) -> dict[str, Level]:
    """The levels that bind under the keys of today: a snapshot's new keys also free what it lists."""
    void = {
        item.role
        for item in seen
        if item.role != ROOT
        and (level := floor.roles.get(item.role)) is not None
        and not stands(level.signers, item.holders)
    }
    if SNAPSHOT in void:
        void = set(floor.roles) - {ROOT, TIMESTAMP} | void
    return {role: level for role, level in floor.roles.items() if role not in void}


def _later(time: SignedTime | None, timestamp: Seen) -> SignedTime | None:
    if time is not None and not stands(time.signers, timestamp.holders):
        time = None
    if timestamp.signed_at_s is None or (time is not None and timestamp.signed_at_s <= time.at_s):
        return time
    return SignedTime(timestamp.signed_at_s, sorted(timestamp.signers))
