"""A disk that is soon full: a small tmpfs where the user may mount one, else a limit on file sizes."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from edge_contract.errors import Reason

_LIBC = ctypes.CDLL(None, use_errno=True)


class SmallDisk(NamedTuple):
    """A folder, and the reason code of a write that does not fit any more."""

    folder: Path
    reason: Reason


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """`folder` on a disk that takes about `size_bytes`.

    Without the right to mount, every file of this process is bounded by that size instead, and what
    does not fit fails with EFBIG, not ENOSPC.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes}".encode()
    if _LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) == 0:
        try:
            yield SmallDisk(folder, Reason.DISK_FULL)
        finally:
            assert _LIBC.umount2(os.fsencode(folder), 2) == 0, os.strerror(ctypes.get_errno())
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield SmallDisk(folder, Reason.STORAGE_FAULT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(folder: Path) -> Path:
    """Write a file that takes what room there is; returns it."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as stream:
        while stream.write(b"x" * 1024) == 1024:
            pass
    return filler


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """What was mounted at `folder` cannot be written; without the right to mount, the folder cannot."""
    readonly, remount = 1, 32
    if _LIBC.mount(None, os.fsencode(folder), None, readonly | remount, None) == 0:
        try:
            yield
        finally:
            assert _LIBC.mount(None, os.fsencode(folder), None, remount, None) == 0
        return
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(mode)
