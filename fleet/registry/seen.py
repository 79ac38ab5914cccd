"""The newest version of each role that was signed or seen here, kept beside the pinned root.

Signatures do not show that metadata is the newest: an older copy of a registry is signed as well. Whoever
can write into its folder could bring it back, and have revoked versions, operators who are gone, and a time
before approvals signed anew. So versions only rise, as they do on a device.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edge_contract import canonical
from edge_contract.console import os_fault
from edge_contract.errors import BundleRejected, InputRejected, Reason
from fleet.registry import files

NAME = "registry.seen.json"
# As much as a snapshot, which names more of each role.
_LIMIT_BYTES = 5_000_000
_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})


class Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file holds: role → version."""

    schema: int
    versions: dict[str, int]


class Mark:
    """What was seen. It is kept in one folder; others beside which the same root lies count, too."""

    def __init__(self, folder: Path, versions: Mapping[str, int]) -> None:
        """Use `read`."""
        self.path = folder / NAME
        self._highest = dict(versions)

    @classmethod
    def read(cls, folders: list[Path]) -> Mark:
        """The mark kept in the first of `folders`. One that is missing says nothing yet.

        Raises InputRejected for one that cannot be read.
        """
        mark = cls(folders[0], _versions(folders[0] / NAME))
        for folder in folders[1:]:
            mark._highest = _highest(mark._highest, _versions(folder / NAME))
        return mark

    def check(self, registry: Path, found: Mapping[str, int]) -> None:
        """Raises BundleRejected when a role's version has fallen."""
        fallen = [role for role, version in self._highest.items() if found.get(role, 0) < version]
        if fallen:
            role = min(fallen, key=lambda r: (r not in ("root", "timestamp"), r))
            raise BundleRejected(
                Reason.TRUST_FAILED,
                f"{registry}: an older copy of the registry: {role} has version {found.get(role, 0)}, "
                f"and {self._highest[role]} was seen before",
                f"restore the newest copy; if all are lost, move {self.path} away, and look at "
                "`registry list` and `keys list` before you sign: what was revoked since is back",
            )

    def raise_to(self, found: Mapping[str, int]) -> None:
        """Keep what was signed or seen. Raises InputRejected, or StorageFault by the disk."""
        self._highest = _highest(self._highest, found)
        try:
            files.write(self.path, canonical.to_bytes(Seen(1, self._highest)), mode=0o600)
        except OSError as e:
            if e.errno in _THE_DISK:
                raise os_fault(e) from e
            raise InputRejected(
                Reason.BAD_INPUT,
                f"{self.path}: what was signed cannot be noted ({e.strerror})",
                "let the one who signs write into the folder in which root.json lies",
            ) from e


def _versions(path: Path) -> Mapping[str, int]:
    try:
        return canonical.from_bytes(path.read_bytes(), Seen, limit_bytes=_LIMIT_BYTES).versions
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise _unreadable(path, str(e.strerror)) from e
    except canonical.DecodeFault as e:
        raise _unreadable(path, f"{e.problem} at {e.path}") from e


def _highest(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {role: max(one.get(role, 0), other.get(role, 0)) for role in {*one, *other}}


def _unreadable(path: Path, why: str) -> InputRejected:
    return InputRejected(
        Reason.BAD_INPUT,
        f"{path}: what was signed last cannot be read: {why}",
        "restore the file, or move it away once you know that the registry is the newest",
    )
