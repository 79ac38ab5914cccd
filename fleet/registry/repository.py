"""A registry's folder: where things lie in it, and how it is made, changed and renewed.

    metadata/timestamp.json, N.root.json, N.targets.json, N.snapshot.json    signed, TUF
    blobs/sha256/ab/<digest>                                                   everything else, manifests too
    root.json                                                                  a copy to pin on devices

What may be published is decided in publish.py, signatures are made in signing.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_contract import canonical, wire
from edge_contract.errors import InputRejected, Reason
from edge_contract.manifest import blob_path
from fleet.registry import files, keys, signing, trust

_PUBLIC_ROOT = "root.json"


class Repository:
    """An existing registry, opened for writing. Use `opened`, which also keeps other writers out."""

    def __init__(self, folder: Path, pinned_root: bytes) -> None:
        """Raises InputRejected (no registry here) and BundleRejected (it was tampered with)."""
        self.folder = folder
        if not (folder / "metadata" / "timestamp.json").is_file():
            raise trust.no_registry(folder)
        self.draft = signing.Draft(str(folder), pinned_root, self._metadata)

    def path(self, sha256: str) -> Path:
        """Where a blob lies."""
        return self.folder / blob_path(sha256)

    def write(self, file: signing.File) -> None:
        """Make one metadata file durable."""
        files.write(self.folder / "metadata" / file.name, file.data)

    def _metadata(self, name: str) -> bytes | None:
        try:
            return (self.folder / "metadata" / name).read_bytes()
        except FileNotFoundError:
            return None


@contextmanager
def opened(folder: Path, pinned_root: bytes) -> Iterator[Repository]:
    """The registry in `folder`, held against other writers."""
    if not folder.is_dir():
        raise trust.no_registry(folder)
    with files.locked(folder):
        yield Repository(folder, pinned_root)


def create(folder: Path, keys_folder: Path, password: bytes, label: str, periods: signing.Periods) -> None:
    """Make keys and an empty registry. Both appear whole or not at all; nothing is ever overwritten."""
    check_new(folder, keys_folder)
    made = keys.generate()
    with files.staged(keys_folder, mode=0o700) as new_keys, files.staged(folder) as new:
        root = _fill(new, made, label, periods)
        keys.save(new_keys, made, password)
        files.write(new_keys / keys.PINNED_ROOT, root)


def refresh(
    repository: Repository, keyring: keys.Keys, also: frozenset[str], periods: signing.Periods | None
) -> Iterator[str]:
    """Sign snapshot and timestamp anew, and on request targets and root before them; yields each role."""
    draft, now = repository.draft, datetime.now(UTC)
    if "root" in also:
        root = draft.sign_root(keyring.load("root"), now, periods or draft.periods)
        repository.write(root)
        files.write(repository.folder / _PUBLIC_ROOT, root.data)
        yield "root"
    if "targets" in also:
        repository.write(draft.sign_targets(keyring.load("targets"), now))
        yield "targets"
    yield from sign_online(repository, load_online(keyring))


def load_online(keyring: keys.Keys) -> Mapping[str, Ed25519PrivateKey]:
    """The keys that every change needs."""
    return {role: keyring.load(role) for role in ("snapshot", "timestamp")}


def sign_online(repository: Repository, online: Mapping[str, Ed25519PrivateKey]) -> Iterator[str]:
    """Snapshot, then timestamp: the last write is the one that readers see."""
    now = datetime.now(UTC)
    repository.write(repository.draft.sign_snapshot(online["snapshot"], now))
    yield "snapshot"
    repository.write(repository.draft.sign_timestamp(online["timestamp"], now))
    yield "timestamp"


def check_new(folder: Path, keys_folder: Path) -> None:
    """Refuse to mix with what exists, and keys inside the registry: what lies there is served to everyone."""
    for place, what in ((folder, "registry"), (keys_folder, "keys")):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise InputRejected(
                Reason.BAD_INPUT,
                f"{place}: there is something here already, and the {what} would mix with it",
                "name a new folder, or move this one away",
            )
    if keys_folder.resolve().is_relative_to(folder.resolve()):
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{keys_folder}: private keys would lie inside the registry, which is served to everyone",
            "name a folder outside it with --keys",
        )


def _fill(folder: Path, made: Mapping[str, Ed25519PrivateKey], label: str, periods: signing.Periods) -> bytes:
    """Blobs first, metadata after them; returns the root."""
    public = made["operator"].public_key().public_bytes_raw()
    operators = canonical.to_bytes(
        wire.Operators(schema=1, threshold=1, keys=[wire.OperatorKey(public.hex(), label)])
    )
    target = trust.Target(len(operators), canonical.sha256_hex(operators))
    files.write(folder / blob_path(target.sha256), operators)
    metadata = signing.first(made, {wire.OPERATORS_TARGET: target}, periods, datetime.now(UTC))
    for file in metadata:
        files.write(folder / "metadata" / file.name, file.data)
    root = metadata[0].data
    files.write(folder / _PUBLIC_ROOT, root)
    return root
