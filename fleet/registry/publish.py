"""Publishing a bundle: checked whole before anything is copied, then one durable step after another.

The steps are ordered so that a reader at any moment, and after a kill between any two, finds a
consistent registry: blobs, manifest, targets, snapshot, and the timestamp that makes them visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from edge_contract import canonical
from edge_contract.errors import BundleRejected, InputRejected, Reason
from edge_contract.manifest import Manifest, blob_path, from_bytes, target_name, to_bytes
from fleet.registry import approvals, deltas, files, repository
from fleet.registry.keys import Keys
from fleet.registry.reader import Published, decode_manifest
from fleet.registry.repository import Repository
from fleet.registry.shelves import is_model, model_of
from fleet.registry.trust import Target

# edge-optimize puts the bundle there, beside its report.
_BUNDLE = "bundle"


@dataclass(frozen=True, slots=True)
class Bundle:
    """What edge-optimize wrote, checked."""

    folder: Path
    manifest: Manifest
    data: bytes

    @property
    def sha256(self) -> str:
        """The version's identity: the digest of the manifest's bytes."""
        return canonical.sha256_hex(self.data)


class Outcome(NamedTuple):
    """How publishing ended: `staged` means that approvals are missing. With who has approved, of how many."""

    kind: Literal["published", "already", "staged"]
    approved_by: Sequence[str]
    needed: int


def load(folder: Path) -> Bundle:
    """Read and check a bundle: manifest strict and canonical, every blob of the right size and digest.

    Raises InputRejected (no bundle here) and BundleRejected (something in it is wrong).
    """
    path = folder / "manifest.json"
    if not path.is_file():
        inside = folder / _BUNDLE
        there = (inside / "manifest.json").is_file()
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{folder}: no bundle here (manifest.json is missing)",
            f"name {inside}" if there else f"name the folder `{_BUNDLE}` below what edge-optimize wrote",
        )
    data = path.read_bytes()
    manifest = from_bytes(data)
    if to_bytes(manifest) != data:
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"{path}: not in canonical form, so somebody has edited it",
            "build the bundle again with edge-optimize",
        )
    for blob in manifest.files:
        _check_blob(folder / blob_path(blob.sha256), blob.name, files.Content(blob.size_bytes, blob.sha256))
    return Bundle(folder, manifest, data)


def is_new(bundle: Bundle, published: Sequence[Published], revoked: Mapping[str, int]) -> bool:
    """Whether there is something to do; False when this very bundle is published.

    Versions are immutable and never come back, and release counters rise: anything else raises
    InputRejected. `revoked` are targets with the releases of versions that were taken back.
    """
    manifest = bundle.manifest
    if target_name(manifest.name, manifest.version) in revoked:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{manifest.name}@{manifest.version} was revoked, and a version never comes back",
            "give the bundle another version with edge-optimize",
        )
    same_model = [p for p in published if p.manifest.name == manifest.name]
    for known in same_model:
        if known.manifest.version == manifest.version:
            if known.sha256 == bundle.sha256:
                return False
            raise InputRejected(
                Reason.BAD_INPUT,
                f"{manifest.name}@{manifest.version} is published already with other content"
                f" ({known.sha256[:12]}, this is {bundle.sha256[:12]}), and a version never changes",
                "give the new bundle a version of its own with edge-optimize",
            )
    mine = [release for name, release in revoked.items() if model_of(name) == manifest.name]
    newest = max([*(p.manifest.release for p in same_model), *mine], default=0)
    if manifest.release <= newest:
        raise InputRejected(
            Reason.ROLLBACK_REFUSED,
            f"{manifest.name}@{manifest.version} has release {manifest.release},"
            f" the newest published one has {newest}",
            f"build it with release {newest + 1} or higher, so that devices can tell which is newer",
        )
    return True


def published(repo: Repository, model: str) -> list[Published]:
    """Every version of a model in the registry, read from its folder and checked."""
    return [
        read_manifest(repo, name, target)
        for name, target in repo.draft.targets.items()
        if is_model(name) and model_of(name) == model
    ]


def read_manifest(repo: Repository, name: str, target: Target) -> Published:
    """A published version, read from the registry's folder and checked. Raises BundleRejected."""
    return decode_manifest(repo.blob(target, f"the manifest of {name}"), target)


def find(published: Sequence[Published], name: str, version: str) -> Published:
    """One of the published versions of a model. Raises InputRejected naming what there is."""
    for known in published:
        if known.manifest.version == version:
            return known
    have = ", ".join(p.manifest.version for p in published) or "none"
    raise InputRejected(
        Reason.NOT_PUBLISHED,
        f"{name}@{version} is not in the registry; it has {have} of {name}",
        "publish it with `edge-fleet registry publish`, or name a version from `registry list`",
    )


def run(
    repo: Repository,
    bundle: Bundle,
    keyring: Keys,
    tell: Callable[[str], None],
    *,
    delta_from: Sequence[str] = ("auto",),
) -> Outcome:
    """Publish a bundle, or stage it while it lacks approvals; `tell` gets a word after each durable step.

    `delta_from` says what patches are made from (deltas.bases). Staging needs no key. Raises InputRejected,
    BundleRejected.
    """
    manifest = bundle.manifest
    versions = published(repo, manifest.name)
    if not is_new(bundle, versions, repo.draft.revoked):
        return Outcome("already", [], 0)
    shelf = repo.draft.tree.shelf_of(target_name(manifest.name, manifest.version))
    policy = approvals.policy_for(repo.draft.tree.top, shelf)
    given: Mapping[str, bytes] = {}
    if policy.needed:
        for step in _copy_blobs(repo, bundle):
            tell(step)
        approvals.stage(repo.pending, manifest, bundle.data)
        given = approvals.read(repo.pending, manifest.name, manifest.version, policy).given
        if len(given) < policy.needed:
            return Outcome("staged", approvals.labels(given, policy), policy.needed)
    bases = deltas.bases(versions, delta_from, manifest)
    for step in steps(repo, bundle, keyring, given, bases):
        tell(step)
    approvals.forget(repo.pending, manifest.name, manifest.version)
    return Outcome("published", approvals.labels(given, policy), policy.needed)


def staged(repo: Repository, name: str, version: str) -> Bundle:
    """A version that awaits approvals, as a bundle: its blobs are in the registry already."""
    shelf = repo.draft.tree.shelf_of(target_name(name, version))
    policy = approvals.policy_for(repo.draft.tree.top, shelf)
    found = approvals.read(repo.pending, name, version, policy)
    for blob in found.manifest.files:
        _check_blob(repo.path(blob.sha256), blob.name, files.Content(blob.size_bytes, blob.sha256))
    return Bundle(repo.folder, found.manifest, found.data)


def revoke(repo: Repository, keyring: Keys, name: str, version: str) -> None:
    """Take a published version back. Raises InputRejected when it is not published."""
    target = repo.draft.targets.get(target_name(name, version))
    if target is None:
        versions = [p.manifest.version for p in published(repo, name)]
        raise InputRejected(
            Reason.NOT_PUBLISHED,
            f"{name}@{version} is not published here; of {name} there is {', '.join(versions) or 'nothing'}",
            "name a version from `edge-fleet registry list`",
        )
    release = read_manifest(repo, target_name(name, version), target).manifest.release
    repo.draft.revoke(target_name(name, version), release)
    list(repository.sign(repo, keyring))


def steps(
    repo: Repository,
    bundle: Bundle,
    keyring: Keys,
    given: Mapping[str, bytes] | None = None,
    bases: Sequence[Manifest] | None = None,
) -> Iterator[str]:
    """Publish; yields a word after each durable step. All keys are read before the first one.

    `given` are the approvals that the version has, verified. Blobs are offered compressed and as patches
    from `bases` too, or only whole when that is None.
    """
    target = Target(len(bundle.data), bundle.sha256)
    proof = approvals.pack(given) if given else b""
    custom = {approvals.FIELD: Target(len(proof), canonical.sha256_hex(proof))._asdict()} if given else None
    repo.draft.add(target_name(bundle.manifest.name, bundle.manifest.version), target, custom)
    signers = repository.load(repo, keyring, repo.draft.needed())
    yield from _copy_blobs(repo, bundle)
    if given:
        files.write(repo.path(canonical.sha256_hex(proof)), proof)
    files.write(repo.path(bundle.sha256), bundle.data)
    yield "manifest"
    if bases is not None:
        yield from map(str, deltas.offer(repo, Published(bundle.manifest, bundle.sha256), bases))
    yield from repository.publish(repo, signers)


def _copy_blobs(repo: Repository, bundle: Bundle) -> Iterator[str]:
    for blob in bundle.manifest.files:
        source = bundle.folder / blob_path(blob.sha256)
        copied = files.copy(source, repo.path(blob.sha256), files.Content(blob.size_bytes, blob.sha256))
        yield f"{blob.role} {blob.name}{'' if copied else ' (there already)'}"


def _check_blob(path: Path, name: str, expected: files.Content) -> None:
    if not path.is_file():
        raise BundleRejected(
            Reason.BLOB_MISSING, f"{path}: the blob of {name} is missing", "build the bundle again"
        )
    found = files.content(path)
    if found != expected:
        raise BundleRejected(
            Reason.DIGEST_MISMATCH,
            f"{path}: the blob of {name} has {found.size_bytes} bytes and digest {found.sha256[:12]},"
            f" the manifest says {expected.size_bytes} and {expected.sha256[:12]}",
            "build the bundle again with edge-optimize; do not edit its files",
        )
