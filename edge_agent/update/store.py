"""The store: immutable version folders by manifest digest, and the links that say what serves.

It knows nothing of networks or trust: what it is given has been verified.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from contextlib import suppress
from pathlib import Path

from edge_agent import files, verified
from edge_agent.layout import MANIFEST, Layout
from edge_agent.update.journal import Ref
from edge_contract import canonical, manifest
from edge_contract.console import os_fault
from edge_contract.errors import BundleRejected, EdgewardError, Reason, StorageFault

_CHUNK_BYTES = 1 << 20
_BUILDING = ".building"


class Store:
    """Version folders and links below one state directory."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        with suppress(StorageFault):  # what is there can be read and served from; who writes will be told
            self.make_folders()

    def make_folders(self) -> None:
        """What everything else expects. Raises StorageFault on a disk that takes none."""
        here = self._layout
        for folder in (here.store, here.staging, here.models, here.journal, here.trust):
            files.make_folder(folder)

    def manifest_of(self, digest: str) -> manifest.Manifest:
        """The manifest of a stored version; its bytes must still have that digest.

        Raises BundleRejected when it is missing or damaged.
        """
        data = files.read(self._layout.version(digest) / MANIFEST)
        if data is None or canonical.sha256_hex(data) != digest:
            state = "missing" if data is None else "damaged"
            raise BundleRejected(
                Reason.DIGEST_MISMATCH,
                f"stored version {digest[:12]} is {state}",
                "deploy the version again; if this repeats, check the disk",
            )
        return manifest.from_bytes(data)

    def has(self, digest: str) -> bool:
        """Whether the version is whole in the store (every file of its digest).

        Raises StorageFault when the disk does not say: that is neither yes nor no.
        """
        try:
            found = self.manifest_of(digest)
        except BundleRejected:
            return False
        folder = self._layout.version(digest)
        return all(file_matches(folder / f.name, f) for f in found.files)

    def find_blob(self, blob: manifest.File) -> Path | None:
        """A stored file with the content of `blob`, from any version, verified anew."""
        for digest in files.names(self._layout.store):
            with suppress(EdgewardError):  # unreadable or damaged: there may be another, or the registry
                for other in self.manifest_of(digest).files:
                    path = self._layout.version(digest) / other.name
                    if other.sha256 == blob.sha256 and file_matches(path, blob):
                        return path
        return None

    def blobs(self) -> dict[str, Path]:
        """Every stored file by the digest that it should have; whether it still has it is not looked at."""
        found: dict[str, Path] = {}
        for digest in files.names(self._layout.store):
            with suppress(EdgewardError):  # unreadable or damaged: then it is no base either
                for blob in self.manifest_of(digest).files:
                    found.setdefault(blob.sha256, self._layout.version(digest) / blob.name)
        return found

    def add(self, found: manifest.Manifest, sources: dict[str, Path]) -> str:
        """Install a verified version: hard links of `sources` (by blob digest) in one new folder.

        Returns its digest. A damaged folder of the same digest, perhaps one that serves, is replaced.
        """
        data = manifest.to_bytes(found)
        digest = canonical.sha256_hex(data)
        final = self._layout.version(digest)
        building = self._layout.staging / f"{digest}{_BUILDING}"
        if building.exists():
            shutil.rmtree(building)
        files.make_folder(building)
        files.write(building / MANIFEST, data)
        for blob in found.files:
            files.hard_link(sources[blob.sha256], building / blob.name)
        if self._is_damaged(digest):
            files.replace_folder(building, final)
        else:
            files.install_folder(building, final)
        # Without it (a full disk, a cut here) the next start hashes.
        with suppress(StorageFault):
            verified.remember(self._layout, digest, time.time_ns() // 1_000_000)
        return digest

    def _is_damaged(self, digest: str) -> bool:
        try:
            return self._layout.version(digest).exists() and not self.has(digest)
        except StorageFault:
            return True  # a whole one is at hand, so nothing is lost if the old one is whole after all

    def current(self, name: str) -> Ref | None:
        """What the disk says serves; None when there is none or it is damaged.

        Raises StorageFault when the disk does not say.
        """
        return self._ref(self._layout.current(name))

    def previous(self, name: str) -> Ref | None:
        """The version before, kept for a revert. Raises StorageFault when the disk does not say."""
        return self._ref(self._layout.previous(name))

    def named(self, name: str) -> tuple[str | None, str | None]:
        """The digests that `current` and `previous` name, whole or not. Raises StorageFault."""
        return files.link_target(self._layout.current(name)), files.link_target(self._layout.previous(name))

    def point(self, name: str, current: Ref | None, previous: Ref | None) -> None:
        """Make the links say so; `previous` first, so that a revert always finds what it goes back to."""
        self._set(self._layout.previous(name), previous)
        self._set(self._layout.current(name), current)

    def names(self) -> list[str]:
        """Models that serve, by the disk."""
        models = files.names(self._layout.models)
        return [name for name in models if "current" in files.names(self._layout.models / name)]

    def clear_models(self, stamp: int) -> list[str]:
        """Set aside what is no folder where a model's links belong, as a filesystem check may leave it.

        Returns their new names, in the state folder. Raises StorageFault.
        """
        strays = [name for name in files.names(self._layout.models) if not self._is_folder(name)]
        return [
            files.set_aside(self._layout.models / name, stamp, self._layout.state).name for name in strays
        ]

    def _is_folder(self, name: str) -> bool:
        try:
            return (self._layout.models / name).is_dir()
        except OSError as e:
            raise os_fault(e) from e

    def collect(self, keep: set[str]) -> list[str]:
        """Remove versions that no link names and that are not in `keep`; returns their digests.

        Their prepared forms go with them. Raises StorageFault, before anything is removed, when one link
        cannot be read.
        """
        keep = set(keep)
        for name in files.names(self._layout.models):
            keep |= {digest for digest in self.named(name) if digest is not None}
        files.remove_leftovers(self._layout.store)
        gone = [digest for digest in files.names(self._layout.store) if digest not in keep]
        for digest in gone:
            files.remove_tree(self._layout.version(digest))
        self._collect_beside()
        return gone

    def clean(self) -> None:
        """Remove what cut-off operations left, but not what a download can go on with."""
        here = self._layout
        for folder in (
            here.state,
            here.journal,
            here.floor,
            *(here.models / name for name in files.names(here.models)),
        ):
            files.remove_leftovers(folder)
        with files.held(here.staging / ".lock") as alone:
            for name in files.names(here.staging) if alone else []:
                if name.endswith(_BUILDING):
                    files.remove_tree(here.staging / name)

    def _collect_beside(self) -> None:
        """After the versions: a form or a record without its version is of no use."""
        files.remove_leftovers(self._layout.records)
        for name in files.names(self._layout.records):
            if name.removesuffix(".json") not in files.names(self._layout.store):
                files.remove_link(self._layout.records / name)
        files.remove_leftovers(self._layout.prepared)
        for digest in set(files.names(self._layout.prepared)) - set(files.names(self._layout.store)):
            files.remove_tree(self._layout.prepared / digest)
        for digest in files.names(self._layout.prepared):
            files.remove_leftovers(self._layout.prepared / digest)  # a preflight that was cut off

    def _ref(self, link: Path) -> Ref | None:
        digest = files.link_target(link)
        if digest is None:
            return None
        try:
            return Ref(self.manifest_of(digest).version, digest)
        except BundleRejected:
            return None

    def _set(self, link: Path, ref: Ref | None) -> None:
        if ref is None:
            files.remove_link(link)
        elif files.link_target(link) != ref.digest:
            files.swap_link(link, f"../../store/{ref.digest}")


def file_matches(path: Path, blob: manifest.File) -> bool:
    """Whether `path` holds exactly the content of `blob`. Raises StorageFault when the disk does not say."""
    try:
        if path.stat().st_size != blob.size_bytes:
            return False
    except FileNotFoundError:
        return False
    except OSError as e:
        raise os_fault(e) from e
    return hash_file(path) == blob.sha256


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hex, in bounded memory; empty when there is none. Raises StorageFault."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return ""
    except OSError as e:
        if e.filename is None:  # read knows only a descriptor
            e.filename = str(path)
        raise os_fault(e) from e
    return digest.hexdigest()
