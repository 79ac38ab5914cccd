"""Changing who approves, and approving. The values are approvals.py's; this opens files and signs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_contract import wire
from edge_contract.errors import BundleRejected, InputRejected, Reason
from edge_contract.manifest import target_name
from fleet.registry import approvals, operators, repository, shelves, signers, teams
from fleet.registry.approvals import Pending, Policy
from fleet.registry.keys import Keys
from fleet.registry.publish import Bundle
from fleet.registry.repository import Repository


class PolicyChange(NamedTuple):
    """What is to change of a policy, a team's or (None) the registry's. `added` are LABEL=FILE."""

    team: str | None
    needed: int | None
    added: Sequence[str]
    removed: Sequence[str]


def set_policy(repo: Repository, keyring: Keys, change: PolicyChange) -> Policy:
    """Change the policy, if there is something to change, and return it. Raises InputRejected."""
    role = None if change.team is None else teams.role_of(change.team)
    if role is not None and role not in repo.draft.roles():
        raise InputRejected(
            Reason.BAD_INPUT,
            f"there is no team {change.team!r}",
            "make it with `edge-fleet registry delegate`",
        )
    top = repo.draft.tree.top
    policy = approvals.policy_for(top, role)
    keys = {key.label: key for key in policy.keys}
    for label in change.removed:
        if keys.pop(label, None) is None:
            raise InputRejected(
                Reason.BAD_INPUT, f"no approver is called {label!r}", f"there are {', '.join(keys) or 'none'}"
            )
    for pair in change.added:
        key = _named(pair)
        keys[key.label] = key
    after = Policy(policy.needed if change.needed is None else change.needed, list(keys.values()))
    if after != policy:
        approvals.set_policy(top, role, after)
        repo.draft.change({shelves.TOP})
        list(repository.sign(repo, keyring))
    return after


def approve(
    repo: Repository, name: str, version: str, key: Ed25519PrivateKey, expected: str
) -> tuple[Pending, Policy]:
    """Approve a staged version; returns it with all approvals that count. Raises InputRejected.

    `expected` is the digest of the manifest that the approver looked at, at least its first 12 digits: what
    lies staged may have been put there by anyone.
    """
    if not re.fullmatch(r"[0-9a-f]{12,64}", expected.lower()):
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{expected!r} is no digest of a manifest: 12 to 64 hexadecimal digits are",
            "give your own copy of the bundle instead, and its digest is computed",
        )
    tree = repo.draft.tree
    policy = approvals.policy_for(tree.top, tree.shelf_of(target_name(name, version)))
    found = approvals.read(repo.pending, name, version, policy)
    if not found.sha256.startswith(expected.lower()):
        raise BundleRejected(
            Reason.DIGEST_MISMATCH,
            f"{name}@{version} is staged with the manifest {found.sha256[:12]}, not {expected[:12]}",
            "find out who staged the other one before you approve anything",
        )
    approvals.approve(repo.pending, found, policy, key)
    return approvals.read(repo.pending, name, version, policy), policy


def digest_of(bundle: Bundle, name: str, version: str) -> str:
    """The digest to expect of a version, from the approver's own copy. Raises InputRejected."""
    manifest = bundle.manifest
    if (manifest.name, manifest.version) != (name, version):
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{bundle.folder}: this is {manifest.name}@{manifest.version}, not {name}@{version}",
            "name the folder with your copy of the version that you approve",
        )
    return bundle.sha256


def to_plain(key: wire.OperatorKey) -> dict[str, Any]:
    """For --json."""
    return {"label": key.label, "keyid": operators.key_id(key)}


def _named(pair: str) -> wire.OperatorKey:
    label, equals, file = pair.partition("=")
    if not label or not equals or not file:
        raise InputRejected(
            Reason.BAD_INPUT, f"--add {pair!r} is not LABEL=FILE", "write it like --add alice=alice.pub"
        )
    return wire.OperatorKey(operators.raw_hex(signers.read_public(Path(file))), label)
