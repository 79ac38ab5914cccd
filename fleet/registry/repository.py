"""A registry's folder: where things lie in it, and how it is made, changed and renewed.

    metadata/timestamp.json, N.root.json, N.targets.json, N.snapshot.json, …  signed, TUF
    blobs/sha256/ab/<digest>                                                    everything else, manifests too
    pending/<model>@<version>/                                                  versions that await approvals
    root.json                                                                   a copy to pin on devices

What may be published is decided in publish.py, what is signed in draft.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Signer  # type: ignore[attr-defined]

from edge_contract import canonical, wire
from edge_contract.errors import BundleRejected, InputRejected, Reason
from edge_contract.manifest import blob_path
from fleet.registry import draft, files, keys, seen, signers, signing, trust

_PUBLIC_ROOT = "root.json"


class Repository:
    """An existing registry. To write, use `opened`, which also keeps other writers out."""

    def __init__(self, folder: Path, keyring: keys.Keys) -> None:
        """Verified from the root that is pinned beside the keys, and no older than what was seen before.

        Raises InputRejected (no registry here, or an older copy) and BundleRejected (it was tampered with).
        """
        self.folder = folder
        if not (folder / "metadata" / "timestamp.json").is_file():
            raise trust.no_registry(folder)
        pinned_root = keyring.pinned_root()
        # Before the metadata, which another may be writing and noting at this moment.
        self._mark = seen.Mark.read(keyring.root_folders())
        self.draft = draft.Draft(str(folder), pinned_root, self._metadata)
        self._written = dict(self.draft.versions)
        self._mark.check(folder, self._written)
        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def path(self, sha256: str) -> Path:
        """Where a blob lies."""
        return self.folder / blob_path(sha256)

    def blob(self, target: trust.Target, what: str) -> bytes:
        """A blob's bytes, checked; `what` it is, is said when they are not. Raises BundleRejected."""
        path = self.path(target.sha256)
        data = path.read_bytes() if path.is_file() else b""
        if trust.Target(len(data), canonical.sha256_hex(data)) != target:
            raise BundleRejected(
                Reason.DIGEST_MISMATCH,
                f"{path}: {what} is missing or damaged",
                "restore the file from a copy of the registry",
            )
        return data

    @property
    def pending(self) -> Path:
        """Where versions await approvals."""
        return self.folder / "pending"

    def write(self, file: signing.File) -> None:
        """Make one metadata file durable; of a root, the copy that devices to come pin, too."""
        files.write(self.folder / "metadata" / file.name, file.data)
        if file.role == "root":
            files.write(self.folder / _PUBLIC_ROOT, file.data)
        self._written[file.role] = json.loads(file.data)["signed"]["version"]
        # The others are not what readers find before the timestamp, and a kill may come before it.
        if file.role in ("root", "timestamp"):
            self.note(("root",) if file.role == "root" else self._written)

    def note(self, roles: Iterable[str]) -> None:
        """Keep in mind, beside the pinned root, which versions are here. Raises InputRejected."""
        self._mark.raise_to({role: self._written[role] for role in roles})

    def _metadata(self, name: str) -> bytes | None:
        try:
            return (self.folder / "metadata" / name).read_bytes()
        except FileNotFoundError:
            return None


@contextmanager
def opened(folder: Path, keyring: keys.Keys) -> Iterator[Repository]:
    """The registry in `folder`, held against other writers."""
    if not folder.is_dir():
        raise trust.no_registry(folder)
    with files.locked(folder):
        repository = Repository(folder, keyring)
        # At once, so that nothing is signed where it cannot be kept in mind.
        repository.note(repository.draft.versions)
        yield repository


class Layout(NamedTuple):
    """How many keys each role of a new registry gets, and how many of them it takes."""

    keys: Mapping[str, int]
    thresholds: Mapping[str, int]


def create(
    folder: Path,
    keys_folder: Path,
    password: bytes,
    label: str,
    periods: signing.Periods,
    layout: Layout,
) -> None:
    """Make keys and an empty registry. Both appear or neither, keys first; nothing is ever overwritten."""
    check_new(folder, keys_folder)
    made = keys.generate({role: layout.keys.get(role, 1) for role in keys.ROLES})
    with files.staged((keys_folder, 0o700), (folder, 0o755)) as (new_keys, new):
        root = _fill(new, made, layout.thresholds, label, periods)
        keys.save(new_keys, made, password)
        files.write(new_keys / keys.PINNED_ROOT, root)
        seen.Mark(new_keys, {}).raise_to(dict.fromkeys(signing.TOP_ROLES, 1))


def load(repository: Repository, keyring: keys.Keys, roles: Iterable[str]) -> dict[str, list[Signer]]:
    """Signers for roles, all read before the first write. Raises InputRejected."""
    draft = repository.draft
    return {role: keyring.signers(role, draft.authority(role)) for role in sorted(roles)}


def signed(
    repository: Repository, signers: draft.Signers, *, only_timestamp: bool = False
) -> list[signing.File]:
    """All that was changed, signed, in the order in which it is to be written; nothing is written yet.

    The last is the one that readers see. `only_timestamp` is for renewing it when nothing else has changed.
    Raises InputRejected when a signer fails.
    """
    now = repository.now()
    done = list(repository.draft.sign_targets(signers, now))
    if not only_timestamp:
        done.append(repository.draft.sign_snapshot(signers["snapshot"], now))
    return [*done, repository.draft.sign_timestamp(signers["timestamp"], now)]


def publish(repository: Repository, signers: draft.Signers) -> Iterator[str]:
    """Sign all that was changed, then write it; yields each role that is written."""
    for file in signed(repository, signers):
        repository.write(file)
        yield file.role


def sign(repository: Repository, keyring: keys.Keys) -> Iterator[str]:
    """The same with the keys that the changes need."""
    yield from publish(repository, load(repository, keyring, repository.draft.needed()))


def check_new(folder: Path, keys_folder: Path) -> None:
    """Refuse to mix with what exists, and keys inside the registry: what lies there is served to everyone."""
    for place, what in ((folder, "registry"), (keys_folder, "keys")):
        if not files.is_vacant(place):
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


def _fill(
    folder: Path,
    made: Mapping[str, Sequence[Ed25519PrivateKey]],
    thresholds: Mapping[str, int],
    label: str,
    periods: signing.Periods,
) -> bytes:
    """Blobs first, metadata after them; returns the root."""
    public = [key.public_key().public_bytes_raw().hex() for key in made["operator"]]
    named = [wire.OperatorKey(k, label if n == 1 else f"{label} {n}") for n, k in enumerate(public, 1)]
    operators = canonical.to_bytes(
        wire.Operators(schema=1, threshold=thresholds.get("operator", 1), keys=named)
    )
    target = trust.Target(len(operators), canonical.sha256_hex(operators))
    files.write(folder / blob_path(target.sha256), operators)
    by_role = {role: [signers.of_private(key) for key in made[role]] for role in signing.TOP_ROLES}
    metadata = signing.first(by_role, thresholds, {wire.OPERATORS_TARGET: target}, periods, datetime.now(UTC))
    for file in metadata:
        files.write(folder / "metadata" / file.name, file.data)
    root = metadata[0].data
    files.write(folder / _PUBLIC_ROOT, root)
    return root
