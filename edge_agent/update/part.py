"""The part of a blob that is on the disk: appended to, hashed as it grows, synced now and then.

Nothing but the bytes is kept. Whoever resumes reads and hashes them again: that costs a second for some
hundred megabytes, and a saved state of the hash could disagree with the bytes after a power cut.

Space is reserved beyond the file's end (fallocate with KEEP_SIZE), so the length still says how much there
is, and a reservation outlives a kill together with its part.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from edge_agent import files
from edge_contract.console import os_fault

_READ_BYTES = 64 << 10
# What a power cut may cost, in bytes or in the time it took to receive them.
_SYNC_EVERY_BYTES = 8 << 20
_SYNC_EVERY_S = 5.0


class Part:
    """The file `path`, on its way to `size_bytes`. Invariant: `digest` has seen its first `length` bytes.

    Every method raises StorageFault from the disk.
    """

    def __init__(self, path: Path, size_bytes: int, count: Callable[[int], None]) -> None:
        """`count` is called with the bytes that are appended; negative, that are thrown away."""
        self.size_bytes = size_bytes
        self._count = count
        self.path = path
        self.length = 0
        self._digest = hashlib.sha256()
        self._unsynced = 0
        self._synced_s = time.monotonic()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as e:
            raise os_fault(e) from e
        try:
            self._read_on()
            files.reserve(self._descriptor, path, size_bytes)
            os.utime(path)  # somebody wants it: the age by which parts are thrown away begins anew
        except BaseException as e:
            self.close()
            if isinstance(e, OSError):
                raise self._fault(e) from e
            raise

    @property
    def whole(self) -> bool:
        """Whether all bytes are there."""
        return self.length == self.size_bytes

    @property
    def sha256(self) -> str:
        """Digest of what is there, in hex."""
        return self._digest.hexdigest()

    def append(self, data: bytes) -> None:
        """Write at the end."""
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as e:
            with suppress(OSError):  # a short write before the fault: the digest has not seen it
                os.ftruncate(self._descriptor, self.length)
            raise self._fault(e) from e
        self._digest.update(data)
        self.length += len(data)
        self._unsynced += len(data)
        self._count(len(data))
        now_s = time.monotonic()
        if self._unsynced >= _SYNC_EVERY_BYTES or now_s - self._synced_s >= _SYNC_EVERY_S:
            self.sync()

    def restart(self) -> None:
        """Throw away what is there and begin anew."""
        try:
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        except OSError as e:
            raise self._fault(e) from e
        self._count(-self.length)
        self._digest, self.length = hashlib.sha256(), 0
        files.reserve(self._descriptor, self.path, self.size_bytes)

    def sync(self) -> None:
        """Make what is there durable."""
        files.sync_data(self._descriptor, self.path)
        self._unsynced, self._synced_s = 0, time.monotonic()

    def close(self) -> None:
        """What is there stays for the next time."""
        os.close(self._descriptor)

    def _read_on(self) -> None:
        """Hash what an earlier attempt left.

        Whole chunks of zeros at its end are not taken over, unless the file is complete: that is how an
        end looks whose bytes did not reach the disk before a power cut.
        """
        if os.fstat(self._descriptor).st_size > self.size_bytes:
            os.ftruncate(self._descriptor, 0)
        zeros = 0
        while chunk := os.read(self._descriptor, _READ_BYTES):
            if not any(chunk):
                zeros += len(chunk)
                continue
            self._take(zeros, chunk)
            zeros = 0
        if self.length + zeros == self.size_bytes:
            self._take(zeros, b"")
        os.ftruncate(self._descriptor, self.length)
        os.lseek(self._descriptor, self.length, os.SEEK_SET)

    def _take(self, zeros: int, chunk: bytes) -> None:
        for at in range(0, zeros, _READ_BYTES):
            self._digest.update(bytes(min(_READ_BYTES, zeros - at)))
        self._digest.update(chunk)
        self.length += zeros + len(chunk)

    def _fault(self, error: OSError) -> Exception:
        if error.filename is None:  # write knows only a descriptor
            error.filename = str(self.path)
        return os_fault(error)

    def __enter__(self) -> Part:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
