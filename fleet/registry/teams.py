"""Delegations: a model's versions are signed by its team's keys, without the targets key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]

from edge_contract.errors import InputRejected, Reason
from fleet.registry import publish, repository, rotation, shelves, signers
from fleet.registry.keys import Keys
from fleet.registry.repository import Repository
from fleet.registry.signers import Authority


class Team(NamedTuple):
    """A team, the models it gets, and its keys if it is new: public ones, or how many to make (None: one)."""

    name: str
    pattern: str
    publics: Sequence[Key]
    generate: int | None = None
    threshold: int | None = None


class Delegated(NamedTuple):
    """The role, the versions that it took over, and the files of keys that were made for it."""

    role: str
    moved: list[str]
    written: list[Path]


def delegate(repo: Repository, keyring: Keys, team: Team, new_password: Callable[[], bytes]) -> Delegated:
    """Give the models that match a pattern to a team. Raises InputRejected; then nothing has changed."""
    role = role_of(team.name)
    if not shelves.PATTERN.fullmatch(team.pattern):
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{team.pattern!r} matches no model's name",
            "write a model's name, or a pattern with *, ? and [] like vision-*",
        )
    draft = repo.draft
    before = {name: draft.tree.shelf_of(name) for name in draft.targets if shelves.is_model(name)}
    private: dict[str, Ed25519PrivateKey] = {}
    if role in draft.roles():
        _no_keys(team)
        authority = draft.authority(role)
    else:
        private, authority = _keys(role, team)
    draft.change(draft.editor.delegate(role, team.pattern, authority))
    moved = sorted(n for n, shelf in before.items() if shelf != role and draft.tree.shelf_of(n) == role)
    made = rotation.Made(private, ())
    mine = _signers(keyring, role, authority, made)
    if len(mine) >= authority.threshold:
        draft.change({role})
    elif draft.is_changed(role) or draft.version_of(role):
        raise InputRejected(
            Reason.TRUST_FAILED,
            f"{role} has to sign {len(moved)} versions that are published already, and its keys are not here",
            "name the folder with the team's private keys with --keys, once for each folder",
        )
    others = repository.load(repo, keyring, draft.needed() - {role})
    written = made.save(keyring, role, new_password()) if private else []
    list(repository.publish(repo, {**others, role: mine}))
    return Delegated(role, moved, written)


def revoke(repo: Repository, keyring: Keys, team: str, *, adopt: bool) -> list[str]:
    """Take a delegation back; returns its versions, which the registry takes over or which end with it."""
    role = role_of(team)
    if role not in repo.draft.roles():
        teams = [shelves.team_of(r) or "" for r in repo.draft.roles() if shelves.team_of(r)]
        raise InputRejected(
            Reason.BAD_INPUT,
            f"there is no team {team!r} in this registry",
            f"its teams are {', '.join(teams) or 'none'}",
        )
    releases = {
        name: found.manifest.release
        for name, target in repo.draft.targets.items()
        if shelves.is_model(name) and repo.draft.tree.shelf_of(name) == role
        for found in [publish.read_manifest(repo, name, target)]
    }
    names = repo.draft.revoke_team(role, adopt, releases)
    list(repository.sign(repo, keyring))
    return names


def role_of(team: str) -> str:
    """The role of a team by its name. Raises InputRejected for a name that cannot be one."""
    if not shelves.TEAM.fullmatch(team):
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{team!r} is no name for a team",
            "take small letters, digits and `-`, 32 at most",
        )
    return shelves.team_role(team)


def _no_keys(team: Team) -> None:
    if team.publics or team.generate or team.threshold:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"team {team.name} has keys already",
            "leave --key, --count and --threshold away; change its keys with `edge-fleet registry keys`",
        )


def _keys(role: str, team: Team) -> tuple[dict[str, Ed25519PrivateKey], Authority]:
    count = 0 if team.publics else team.generate or 1
    private = [Ed25519PrivateKey.generate() for _ in range(count)]
    named = {key.keyid: key for key in [*team.publics, *map(signers.public_of, private)]}
    threshold = team.threshold or 1
    rotation.check_threshold(role, threshold, len(named))
    return {signers.public_of(key).keyid: key for key in private}, Authority(named, threshold)


def _signers(keyring: Keys, role: str, authority: Authority, made: rotation.Made) -> list[Signer]:
    new = [signer for keyid in authority.keys if (signer := made.signer(keyring, keyid)) is not None]
    return (new or keyring.available(role, authority))[: authority.threshold]
