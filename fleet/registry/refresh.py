"""Renewing signatures before they expire, without a new version. Fit for a timer."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import NamedTuple

from edge_contract.errors import InputRejected, Reason
from fleet.registry import repository, shelves
from fleet.registry.keys import Keys
from fleet.registry.repository import Repository
from fleet.registry.signing import Periods

ONLINE = ("snapshot", "timestamp")


class Refreshed(NamedTuple):
    """The roles that were signed, and those that expire soon without having been: role and time."""

    signed: list[str]
    expiring: dict[str, datetime]


def refresh(
    repo: Repository, keyring: Keys, also: Iterable[str], periods: Periods, within: timedelta | None
) -> Refreshed:
    """Sign snapshot and timestamp anew, and before them the roles in `also`.

    With `within`, only those that expire within that time; then the other roles are looked at, too. Other
    periods than those that the root has make it due.
    Raises InputRejected.
    """
    draft, now = repo.draft, repo.now()
    also = [_known(repo, role) for role in also]
    expiries = {role: expires for role, (_, expires) in draft.expiries().items()}
    due = {role for role, expires in expiries.items() if within is None or expires <= now + within}
    if periods != draft.periods:
        due.add("root")
    wanted = due & {*ONLINE, *also}
    root = keyring.signers("root", draft.authority("root")) if "root" in wanted else []
    targets = sorted(wanted - {"root", *ONLINE})
    needed = {*targets, *(ONLINE if targets or wanted & set(ONLINE) else ())}
    signers = repository.load(repo, keyring, needed)
    files = [draft.sign_root(root, now, periods)] if root else []
    for role in targets:
        draft.change_all(role)
    if needed:
        only_timestamp = not targets and "snapshot" not in wanted
        files += repository.signed(repo, signers, only_timestamp=only_timestamp)
    for file in files:
        repo.write(file)
    signed = list(dict.fromkeys(shelves.key_name(file.role) for file in files))
    left = due - set(signed) if within is not None else set()
    return Refreshed(signed, {role: expiries[role] for role in sorted(left)})


def _known(repo: Repository, role: str) -> str:
    roles = [role for role in repo.draft.roles() if role not in ONLINE]
    if role not in roles:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"--also {role}: there is no such role",
            f"the roles with offline keys are {', '.join(roles)}",
        )
    return role
