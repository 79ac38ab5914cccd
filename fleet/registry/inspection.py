"""What the signed metadata says of roles and their keys, for people and programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from edge_contract import dsse
from edge_contract.errors import InputRejected, Reason
from fleet.registry import operators
from fleet.registry.keys import Keys
from fleet.registry.repository import Repository
from fleet.registry.rotation import OPERATOR


class KeyView(NamedTuple):
    """One key: its id, its kind, its name for people, and the file that holds it, if that was looked for."""

    keyid: str
    kind: str
    label: str
    file: str | None


class RoleView(NamedTuple):
    """One role. `models` are the patterns that a team answers for.

    `unfinished`: somebody began to replace its keys, and old and new ones are good until that is finished.
    """

    role: str
    threshold: int
    keys: Sequence[KeyView]
    version: int
    expires: datetime | None
    models: Sequence[str] = ()
    unfinished: bool = False


def roles(repo: Repository, keyring: Keys, *, check: bool) -> list[RoleView]:
    """Every role that has keys; with `check`, private keys are opened.

    Raises InputRejected, BundleRejected.
    """
    return [*_tuf_roles(repo, keyring, check), _operators(repo, keyring, check)]


def check_role(repo: Repository, role: str) -> None:
    """Raises InputRejected for a role that this registry does not have."""
    known = [*repo.draft.roles(), OPERATOR]
    if role not in known:
        raise InputRejected(
            Reason.BAD_INPUT, f"{role!r} is no role of this registry", f"its roles are {', '.join(known)}"
        )


def to_plain(view: RoleView) -> dict[str, Any]:
    """For --json."""
    return {
        "role": view.role,
        "threshold": view.threshold,
        "version": view.version,
        "expires": view.expires.isoformat() if view.expires else None,
        "models": list(view.models),
        "unfinished": view.unfinished,
        "keys": [key._asdict() for key in view.keys],
    }


def _tuf_roles(repo: Repository, keyring: Keys, check: bool) -> Iterator[RoleView]:
    expiries = repo.draft.expiries()
    for role in repo.draft.roles():
        authority = repo.draft.authority(role)
        held = {key.public.keyid: str(key.path) for key in keyring.found(role)} if check else {}
        views = [KeyView(k, key.keytype, "", held.get(k)) for k, key in authority.keys.items()]
        version, expires = expiries.get(role, (0, None))
        patterns = repo.draft.editor.patterns(role)
        unfinished = repo.draft.unfinished(role) is not None
        yield RoleView(role, authority.threshold, views, version, expires, patterns, unfinished)


def _operators(repo: Repository, keyring: Keys, check: bool) -> RoleView:
    named = operators.read(repo)
    files = keyring.opened(OPERATOR) if check and keyring.files(OPERATOR) else ()
    held = {dsse.key_id(key.public_key().public_bytes_raw()): str(path) for path, key in files}
    ids = [(operators.key_id(key), key.label) for key in named.keys]
    views = [KeyView(keyid, "ed25519", label, held.get(keyid)) for keyid, label in ids]
    return RoleView(OPERATOR, named.threshold, views, 0, None)
