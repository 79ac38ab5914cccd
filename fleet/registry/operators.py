"""Who may sign desired states and commands: changing the target `operators.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Key  # type: ignore[attr-defined]

from edge_contract import canonical, dsse, wire
from edge_contract.errors import BundleRejected, InputRejected, Reason
from fleet.registry import files, keys, repository, rotation, signers
from fleet.registry.keys import Keys
from fleet.registry.repository import Repository
from fleet.registry.rotation import OPERATOR, Change, Changed
from fleet.registry.trust import Target


def read(repo: Repository) -> wire.Operators:
    """The operators as the signed metadata has them. Raises BundleRejected."""
    target = repo.draft.targets[wire.OPERATORS_TARGET]
    path = repo.path(target.sha256)
    data = path.read_bytes() if path.is_file() else b""
    if Target(len(data), canonical.sha256_hex(data)) != target:
        raise BundleRejected(
            Reason.DIGEST_MISMATCH,
            f"{path}: the list of operators is missing or damaged",
            "restore the file from a copy of the registry",
        )
    return canonical.from_bytes(data, wire.Operators)


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
    kept = [key for keyid, key in by_id.items() if keyid not in dropped]
    threshold = wanted.threshold or before.threshold
    rotation.check_threshold(OPERATOR, threshold, len({key.public_hex for key in [*kept, *named]}))
    after = canonical.to_bytes(wire.Operators(schema=1, threshold=threshold, keys=[*kept, *named]))
    retiring = _retiring(keyring, dropped)
    target = Target(len(after), canonical.sha256_hex(after))
    repo.draft.add(wire.OPERATORS_TARGET, target)
    ready = repository.load(repo, keyring, repo.draft.needed())
    written = rotation.Made({str(n): key for n, key in enumerate(private)}, ()).save(
        keyring, OPERATOR, new_password() if private else b""
    )
    files.write(repo.path(target.sha256), after)
    list(repository.publish(repo, ready))
    retired = [keys.retire(path, keyid) for path, keyid in retiring]
    return Changed([key_id(key) for key in named], dropped, written, retired, threshold)


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
    if not dropped:
        return []
    found = keyring.opened(OPERATOR)
    ids = [(path, dsse.key_id(key.public_key().public_bytes_raw())) for path, key in found]
    return [(path, keyid) for path, keyid in ids if keyid in dropped]
