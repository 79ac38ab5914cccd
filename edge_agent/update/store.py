"""The store: immutable version folders by manifest digest, and the links that say what serves.

It knows nothing of networks or trust: what it is given has been verified.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from edge_agent import files
from edge_agent.layout import MANIFEST, Layout
from edge_agent.update.journal import Ref
from edge_contract import canonical, manifest
from edge_contract.errors import BundleRejected, EdgewardError, Reason

_CHUNK_BYTES = 1 << 20


class Store:
    """Version folders and links below one state directory."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        for folder in (layout.store, layout.staging, layout.models, layout.journal, layout.trust):
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
        """Whether the version is whole in the store (every file of its digest)."""
        try:
            found = self.manifest_of(digest)
        except EdgewardError:
            return False
        folder = self._layout.version(digest)
        return all(file_matches(folder / f.name, f) for f in found.files)

    def find_blob(self, blob: manifest.File) -> Path | None:
        """A stored file with the content of `blob`, from any version, verified anew."""
        for folder in sorted(self._layout.store.iterdir()):
            try:
                known = self.manifest_of(folder.name)
            except EdgewardError:
                continue
            for other in known.files:
                if other.sha256 == blob.sha256 and file_matches(folder / other.name, blob):
                    return folder / other.name
        return None

    def add(self, found: manifest.Manifest, sources: dict[str, Path]) -> str:
        """Install a verified version: hard links of `sources` (by blob digest) in one new folder.

        Returns its digest. A damaged folder of the same digest is replaced.
        """
        data = manifest.to_bytes(found)
        digest = canonical.sha256_hex(data)
        final = self._layout.version(digest)
        building = self._layout.staging / f"{digest}.building"
        if building.exists():
            shutil.rmtree(building)
        files.make_folder(building)
        files.write(building / MANIFEST, data)
        for blob in found.files:
            files.hard_link(sources[blob.sha256], building / blob.name)
        if final.exists() and not self.has(digest):
            files.remove_tree(final)  # not earlier: its good files may be among the sources
        files.install_folder(building, final)
        return digest

    def current(self, name: str) -> Ref | None:
        """What the disk says serves; None when there is none or it is damaged."""
        return self._ref(self._layout.current(name))

    def previous(self, name: str) -> Ref | None:
        """The version before, kept for a revert."""
        return self._ref(self._layout.previous(name))

    def point(self, name: str, current: Ref | None, previous: Ref | None) -> None:
        """Make the links say so; `previous` first, so that a revert always finds what it goes back to."""
        self._set(self._layout.previous(name), previous)
        self._set(self._layout.current(name), current)

    def names(self) -> list[str]:
        """Models that serve, by the disk."""
        return sorted(p.parent.name for p in self._layout.models.glob("*/current"))

    def collect(self, keep: set[str]) -> list[str]:
        """Remove versions that no link names and that are not in `keep`; returns their digests.

        Their prepared forms go with them.
        """
        keep = set(keep)
        files.remove_leftovers(self._layout.store)
        for link in self._layout.models.glob("*/*"):
            target = files.link_target(link) if link.is_symlink() else None
            if target:
                keep.add(target)
        gone = [p for p in self._layout.store.iterdir() if p.name not in keep]
        for folder in gone:
            files.remove_tree(folder)
        self._collect_prepared()
        return [p.name for p in gone]

    def _collect_prepared(self) -> None:
        """After the versions: a form without its version is of no use."""
        files.remove_leftovers(self._layout.prepared)
        if self._layout.prepared.is_dir():
            for folder in self._layout.prepared.iterdir():
                if not self._layout.version(folder.name).is_dir():
                    files.remove_tree(folder)

    def _ref(self, link: Path) -> Ref | None:
        digest = files.link_target(link)
        if digest is None:
            return None
        try:
            return Ref(self.manifest_of(digest).version, digest)
        except EdgewardError:
            return None

    def _set(self, link: Path, ref: Ref | None) -> None:
        if ref is None:
            files.remove_link(link)
        elif files.link_target(link) != ref.digest:
            files.swap_link(link, f"../../store/{ref.digest}")


def file_matches(path: Path, blob: manifest.File) -> bool:
    """Whether `path` holds exactly the content of `blob`."""
    try:
        if path.stat().st_size != blob.size_bytes:
            return False
    except OSError:
        return False
    return hash_file(path) == blob.sha256


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hex, in bounded memory; empty when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()
