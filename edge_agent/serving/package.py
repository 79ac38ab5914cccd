"""A version on disk, as a store folder (files by name) or a bundle folder (blobs by digest).

It reads and checks; it loads no model. Downloading and storing are the updater's.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

from edge_agent.layout import MANIFEST
from edge_contract import canonical
from edge_contract import manifest as manifests
from edge_contract.console import os_fault
from edge_contract.errors import BundleRejected, InputRejected, Reason
from edge_contract.manifest import File, Manifest

_FETCH_AGAIN = "remove this version from the store and let the device fetch it again"


@dataclass(frozen=True, slots=True)
class Package:
    """A manifest and where the content of each of its files lies. `digest` is the manifest's SHA-256."""

    manifest: Manifest
    digest: str
    paths: Mapping[str, Path]

    @property
    def model(self) -> Path:
        """The model's file."""
        return self.paths[self.manifest.file("model").name]

    @property
    def label(self) -> str:
        """`name@version`, for people."""
        return f"{self.manifest.name}@{self.manifest.version}"

    @property
    def golden(self) -> Path:
        """The golden vectors' file."""
        return self.paths[self.manifest.file("golden").name]


def read(folder: Path) -> Package:
    """Read the manifest of a bundle or store folder and locate its files.

    Raises InputRejected when there is no manifest, BundleRejected when it is invalid.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputRejected(
            Reason.BAD_INPUT, f"{folder} has no {MANIFEST}", "name a bundle folder or a version in the store"
        )
    try:
        data = path.read_bytes()
    except OSError as e:
        raise os_fault(e) from e
    manifest = manifests.from_bytes(data)
    in_blobs = (folder / "blobs").is_dir()
    paths = {f.name: folder / (manifests.blob_path(f.sha256) if in_blobs else f.name) for f in manifest.files}
    return Package(manifest, canonical.sha256_hex(data), paths)


def check_sizes(package: Package) -> None:
    """Every file is there and as long as the manifest says. Raises BundleRejected."""
    for file in package.manifest.files:
        _check_size(file, package.paths[file.name])


def check_digests(package: Package) -> None:
    """Every file is what the manifest says, byte for byte. Raises BundleRejected."""
    check_sizes(package)
    for file in package.manifest.files:
        found = file_digest(package.paths[file.name])
        if found != file.sha256:
            raise BundleRejected(
                Reason.DIGEST_MISMATCH,
                f"{file.name} has SHA-256 {found[:12]}…, its manifest says {file.sha256[:12]}…",
                _FETCH_AGAIN,
            )


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex. Raises StorageFault."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise os_fault(e) from e


@contextmanager
def named_model(package: Package) -> Iterator[Path]:
    """The model's path with its external data beside it by name, for as long as it is needed.

    Only a bundle folder with external data needs copies; everything else is used where it lies.
    """
    external = [f for f in package.manifest.files if f.role == "external_data"]
    if all(package.paths[f.name].name == f.name for f in external):
        yield package.model
        return
    with tempfile.TemporaryDirectory(prefix="edgeward-") as folder:
        for file in (package.manifest.file("model"), *external):
            copyfile(package.paths[file.name], Path(folder) / file.name)
        yield Path(folder) / package.manifest.file("model").name


def _check_size(file: File, path: Path) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as e:
        raise BundleRejected(Reason.BLOB_MISSING, f"{path} is missing", _FETCH_AGAIN) from e
    except OSError as e:
        raise os_fault(e) from e
    if size != file.size_bytes:
        raise BundleRejected(
            Reason.DIGEST_MISMATCH,
            f"{file.name} has {size} bytes, its manifest says {file.size_bytes}",
            _FETCH_AGAIN,
        )
