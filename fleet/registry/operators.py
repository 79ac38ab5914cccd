"""Who may sign desired states and commands: changing the target `operators.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Key  # type: ignore[attr-defined]

from edge_contract import canonical, dsse, wire
from edge_contract.errors import BundleRejected, InputRejected, Reason
from fleet.registry import files, keys, repository, rotation, signers
from fleet.registry.keys import Keys
from fleet.registry.repository import Repository
from fleet.registry.rotation import OPERATOR, Change, Changed
from fleet.registry.trust import Target


class Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The list as it is signed, without devices' limits: one that they refuse is read to be repaired."""

    schema: Literal[1]
    threshold: int
    keys: list[wire.OperatorKey]


def read(repo: Repository) -> Listed:
    """The operators as the signed metadata has them. Raises BundleRejected."""
    data = repo.blob(repo.draft.targets[wire.OPERATORS_TARGET], "the list of operators")
    try:
        return canonical.from_bytes(data, Listed)
    except canonical.DecodeFault as e:
        raise BundleRejected(
            Reason.TRUST_FAILED,
            f"{wire.OPERATORS_TARGET}: {e.problem} at {e.path}",
            "use the version of edgeward that signed it, or restore the registry from a copy",
        ) from e


def key_id(key: wire.OperatorKey) -> str:
    """The id that a signature names."""
    return dsse.key_id(bytes.fromhex(key.public_hex))


def check_uris(uris: Sequence[str]) -> None:
    """Raises InputRejected when there are any: messages are signed with keys in files."""
    if uris:
        raise InputRejected(
            Reason.BAD_INPUT,
            "an operator's key signs messages with Ed25519 and has to be a file",
            "leave --uri away; modules and clouds can hold the keys of all other roles",
        )


def change(repo: Repository, keyring: Keys, wanted: Change, new_password: Callable[[], bytes]) -> Changed:
    """Other operators' keys. Raises InputRejected; then nothing has changed."""
    before = read(repo)
    by_id = {key_id(key): key for key in before.keys}
    dropped = rotation.resolve(wanted, list(by_id))
    private = [Ed25519PrivateKey.generate() for _ in range(rotation.how_many(wanted, dropped))]
    new = [*(raw_hex(signers.public_of(key)) for key in private), *map(raw_hex, wanted.publics)]
    labels = _labels(wanted.label, [by_id[keyid].label for keyid in dropped], len(new))
    named = [wire.OperatorKey(public, label) for public, label in zip(new, labels, strict=True)]
    fresh = {key.public_hex for key in named}
    kept = [key for keyid, key in by_id.items() if keyid not in dropped and key.public_hex not in fresh]
    threshold = wanted.threshold or before.threshold
    after = _encoded(threshold, [*kept, *named])
    retiring = _retiring(keyring, dropped)
    target = Target(len(after), canonical.sha256_hex(after))
    repo.draft.add(wire.OPERATORS_TARGET, target)
    ready = repository.load(repo, keyring, repo.draft.needed())
    written = rotation.Made({str(n): key for n, key in enumerate(private)}, ()).save(
        keyring, OPERATOR, new_password() if private else b""
    )
    files.write(repo.path(target.sha256), after)
    list(repository.publish(repo, ready))
    retired, warnings = keys.retire(retiring)
    added = [key_id(key) for key in named]
    return Changed(added, dropped, written, retired, threshold, [*keys.exposed(written), *warnings])


def _encoded(threshold: int, named: Sequence[wire.OperatorKey]) -> bytes:
    """The list as devices read it. Raises InputRejected when they would not."""
    distinct = list({key.public_hex: key for key in named}.values())
    rotation.check_threshold(OPERATOR, threshold, len(distinct))
    data = canonical.to_bytes(Listed(1, threshold, distinct))
    try:
        canonical.from_bytes(data, wire.Operators)
    except canonical.DecodeFault as e:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"devices would refuse these {len(distinct)} operators: {e.problem} at {e.path}",
            "name fewer: `keys remove` takes several ids at once, those of people who left",
        ) from e
    return data


def _labels(label: str, before: Sequence[str], count: int) -> list[str]:
    """The name given, else those of the keys that go, in order; numbered where they repeat."""
    names = [label or (before[n] if n < len(before) else OPERATOR) for n in range(count)]
    return [name if names.index(name) == n else f"{name} {n + 1}" for n, name in enumerate(names)]


def raw_hex(key: Key) -> str:
    """A public key as messages' signatures are checked with. Raises InputRejected unless it is Ed25519."""
    if key.keytype != "ed25519":
        raise InputRejected(
            Reason.BAD_INPUT,
            f"a key for messages and approvals has to be Ed25519, this one is {key.keytype}",
            "make one with `edge-fleet registry keys new`",
        )
    return str(key.keyval["public"])


def _retiring(keyring: Keys, dropped: Sequence[str]) -> list[tuple[Path, str]]:
    if not dropped or not keyring.files(OPERATOR):
        return []
    found = keyring.opened(OPERATOR)
    ids = [(path, dsse.key_id(key.public_key().public_bytes_raw())) for path, key in found]
    return [(path, keyid) for path, keyid in ids if keyid in dropped]
