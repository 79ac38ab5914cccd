"""Which stored versions were hashed, and when: so that a start need not read every model twice.

The record of a version holds, per file, size, modification time, inode and device. While they are the same,
`check` believes the digests of then; when one differs, it hashes. A bit that flips on the disk changes none
of them, so `rehash` reads all bytes again from time to time, and forgets what it finds damaged.
Used by the updater and by the inference process, which may not be allowed to write here: then it hashes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from msgspec import Struct

from edge_agent import files, sealed
from edge_agent.layout import MANIFEST, Layout
from edge_contract import canonical, manifest
from edge_contract.console import os_fault
from edge_contract.errors import BundleRejected, Reason, StorageFault
from edge_contract.manifest import Digest

_CHUNK_BYTES = 1 << 20
_STEP = "it is fetched again under the same digest; if this repeats, check the disk"
Pace = Callable[[int], None]


class Seen(Struct, frozen=True, forbid_unknown_fields=True):
    """A file as it was when it had its digest."""

    size_bytes: int
    mtime_ns: int
    inode: int
    device: int


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """A version that was whole. `hashed_ms`: when all its bytes were last read, Unix milliseconds."""

    schema: Literal[1]
    digest: Digest
    hashed_ms: int
    files: dict[str, Seen]


def check(layout: Layout, digest: str, now_ms: int) -> bool:
    """Make sure that a version is whole, by its record or else by its digests; True when it was hashed.

    Raises BundleRejected when it is damaged, StorageFault when the disk does not say.
    """
    known = record(layout, digest)
    if known is not None and known.files == _look(layout.version(digest)):
        return False
    rehash(layout, digest, now_ms)
    return True


def rehash(layout: Layout, digest: str, now_ms: int, pace: Pace | None = None) -> None:
    """Read all bytes of a version, past the cache, and compare; `pace` is called with each count of bytes.

    Raises BundleRejected when it is damaged, and StorageFault when the disk does not say; either way it is
    not believed without hashing any more.
    """
    folder = layout.version(digest)
    try:
        before = _look(folder)
        for name, size_bytes, sha256 in _expected(folder, digest):
            _check_file(folder / name, before.get(name), size_bytes, sha256, pace or (lambda _: None))
    except (BundleRejected, StorageFault):
        with suppress(StorageFault):
            files.remove_link(layout.verified(digest))
        raise
    with suppress(StorageFault):  # a disk that takes no record: the next start hashes again
        _write(layout, Record(1, digest, now_ms, before))


def remember(layout: Layout, digest: str, now_ms: int) -> None:
    """Record a version of which every file was hashed just now. Raises StorageFault."""
    _write(layout, Record(1, digest, now_ms, _look(layout.version(digest))))


def record(layout: Layout, digest: str) -> Record | None:
    """What is recorded of a version. One that is damaged, unreadable or of another version is none."""
    try:
        found = sealed.read(layout.verified(digest), Record)
    except (canonical.DecodeFault, StorageFault):
        return None
    return found if found is not None and found.digest == digest else None


def _write(layout: Layout, value: Record) -> None:
    path = layout.verified(value.digest)
    files.make_folder(path.parent)
    sealed.write(path, value)


def _look(folder: Path) -> dict[str, Seen]:
    found = {}
    for name in files.names(folder):
        try:
            status = (folder / name).stat(follow_symlinks=False)
        except OSError as e:
            raise os_fault(e) from e
        found[name] = Seen(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)
    return found


def _expected(folder: Path, digest: str) -> Iterator[tuple[str, int, str]]:
    """Name, size and digest of every file, the manifest first."""
    data = files.read(folder / MANIFEST)
    if data is None or canonical.sha256_hex(data) != digest:
        state = "missing" if data is None else "damaged"
        raise BundleRejected(
            Reason.DIGEST_MISMATCH, f"the manifest of version {digest[:12]} is {state}", _STEP
        )
    yield MANIFEST, len(data), digest
    for file in manifest.from_bytes(data).files:
        yield file.name, file.size_bytes, file.sha256


def _check_file(path: Path, seen: Seen | None, size_bytes: int, sha256: str, pace: Pace) -> None:
    version = path.parent.name[:12]
    if seen is None:
        raise BundleRejected(Reason.BLOB_MISSING, f"{path.name} of version {version} is missing", _STEP)
    if seen.size_bytes != size_bytes:
        raise BundleRejected(
            Reason.DIGEST_MISMATCH,
            f"{path.name} of version {version} has {seen.size_bytes} bytes instead of {size_bytes}",
            _STEP,
        )
    if sha256_of(path, pace) != sha256:
        raise BundleRejected(
            Reason.DIGEST_MISMATCH, f"{path.name} of version {version} is damaged (its digest differs)", _STEP
        )


def sha256_of(path: Path, pace: Pace) -> str:
    """SHA-256 of a file in hex, past the cache. Raises StorageFault."""
    digest = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what counts is on the disk
            while chunk := os.read(descriptor, _CHUNK_BYTES):
                digest.update(chunk)
                pace(len(chunk))
        finally:
            os.close(descriptor)
    except OSError as e:
        e.filename = e.filename or str(path)
        raise os_fault(e) from e
    return digest.hexdigest()
