"""The staging folder: blobs that are whole, parts of blobs, and the space for what is coming.

Names: `SHA256` is a whole blob, `SHA256.part` its beginning. Both stay until the version they belong to is in
the store, nobody has wanted them for long, or their space is needed. Whoever changes it holds its lock,
except for adding a whole blob under its digest (`edge-agent import`), which is one rename.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_agent import files
from edge_agent.layout import Layout
from edge_agent.update import journal, plan
from edge_agent.update.store import Store, file_matches
from edge_contract.canonical import DecodeFault
from edge_contract.console import os_fault
from edge_contract.errors import Reason, StorageFault
from edge_contract.manifest import File

PART = ".part"
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the filesystem's is


class Staging:
    """One device's staging folder."""

    def __init__(self, layout: Layout, store: Store) -> None:
        self.folder = layout.staging
        self._layout = layout
        self._store = store

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for the lock and hold it for a block."""
        descriptor = files.lock(self.folder / ".lock")
        try:
            yield
        finally:
            os.close(descriptor)

    def whole(self, blob: File) -> Path | None:
        """The blob, if it lies here whole."""
        path = self.folder / blob.sha256
        return path if file_matches(path, blob) else None

    def begun_bytes(self, blob: File) -> int:
        """Length of its part."""
        with suppress(OSError):
            return min(blob.size_bytes, (self.folder / f"{blob.sha256}{PART}").stat().st_size)
        return 0

    def make_room(
        self, blobs: Sequence[File], reserve_bytes: int, keep: Set[str], held: Set[str] = frozenset()
    ) -> None:
        """Reserve the disk for `blobs`; in need, collect versions and leftovers that nobody needs.

        `keep` are the digests of blobs that this update uses, `held` those of versions that it takes blobs
        from. Raises StorageFault when there is no room.
        """
        if self._lacking(blobs, reserve_bytes) > 0:
            self._collect_versions(held)
        lacking = self._lacking(blobs, reserve_bytes)
        if lacking > 0:
            self._remove(plan.victims(self._leftovers(), keep, lacking))
            lacking = self._lacking(blobs, reserve_bytes)
        self.check_room(files.free_bytes(self.folder) + lacking)
        for blob in blobs:
            self._reserve(blob)

    def check_room(self, needed_bytes: int) -> None:
        """Raises StorageFault when fewer bytes are free."""
        free, where = files.free_bytes(self.folder), self._layout.state
        if needed_bytes > free:
            raise StorageFault(
                Reason.DISK_FULL,
                f"the update needs {needed_bytes} bytes with its reserve, {where} has {free} free",
                "free space on the device, or lower [update] disk_reserve_bytes",
            )

    def sweep(self, keep: Set[str], keep_s: float) -> None:
        """Remove what nobody has wanted for `keep_s` seconds."""
        self._remove(plan.outdated(self._leftovers(), keep, keep_s))

    def drop(self, digests: Set[str]) -> None:
        """Remove all of these: they are in the store."""
        self._remove([f.name for f in self._leftovers() if f.sha256 in digests])

    def _lacking(self, blobs: Sequence[File], reserve_bytes: int) -> int:
        taken = {f.sha256: 0 for f in blobs}
        for leftover in self._leftovers():
            if leftover.sha256 in taken:
                taken[leftover.sha256] += leftover.allocated_bytes
        sizes = [(blob.size_bytes, taken[blob.sha256]) for blob in blobs]
        return plan.free_bytes_needed(sizes, reserve_bytes) - files.free_bytes(self.folder)

    def _reserve(self, blob: File) -> None:
        path = self.folder / f"{blob.sha256}{PART}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as e:
            raise os_fault(e) from e
        try:
            files.reserve(descriptor, path, blob.size_bytes)
        finally:
            os.close(descriptor)

    def _collect_versions(self, held: Set[str]) -> None:
        """Versions that no link and no update under way names, but not those `held`.

        Safe beside the control process: every update passes through a fetch, which waits for our lock, before
        it may use a version that neither a link nor the journal names.
        """
        needed = _named_by_journals(self._layout)
        if needed is not None:
            self._store.collect(needed | held)

    def _leftovers(self) -> list[plan.Leftover]:
        now_s = time.time()
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.lstat()
                if path.is_file() and not path.name.startswith("."):
                    age_s = now_s - status.st_mtime
                    found.append(plan.Leftover(path.name, age_s, status.st_blocks * _BLOCK_BYTES))
        return found

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            files.remove_link(self.folder / name)


def _named_by_journals(layout: Layout) -> set[str] | None:
    """Versions that updates under way need; None when a journal does not say: then nothing is collected."""
    needed: set[str] = set()
    try:
        for name in journal.names(layout):
            needed |= journal.needed(layout, name)
    except (DecodeFault, StorageFault):
        return None
    return needed
