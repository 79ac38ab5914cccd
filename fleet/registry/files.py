"""Durable files: the only place in this program that renames or fsyncs. It knows nothing of registries.

Written, synced, renamed, and the folder synced: after a kill or a power cut a name holds the old bytes
or the new ones. A leftover `.NAME.part` is overwritten by the next try.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from edge_contract.errors import BundleRejected, InputRejected, Reason

_CHUNK_BYTES = 1 << 20
_STAGE = ".edgeward.part"


class Content(NamedTuple):
    """What a file holds: its length and the hex SHA-256 of it."""

    size_bytes: int
    sha256: str


def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` durably. Raises OSError and leaves the file before."""
    _place(path, mode, lambda out: out.write(data))


def content(path: Path) -> Content:
    """Length and digest of a file. Raises OSError."""
    with path.open("rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
        return Content(source.tell(), digest)


def copy(source: Path, path: Path, expected: Content) -> bool:
    """Copy durably, checking the very bytes that are written; False when they were there already.

    Raises BundleRejected when the source is not what `expected` says, OSError from the disk.
    """
    if path.is_file() and content(path) == expected:
        return False
    with source.open("rb") as stream:
        _place(path, 0o644, lambda out: _pump(stream, out, source, expected))
    return True


@contextmanager
def staged(*wanted: tuple[Path, int]) -> Iterator[list[Path]]:
    """New folders of these modes that appear under their names, in this order, when the block ends, or none.

    One that is there and empty, as the mount point of a stick is, is filled instead. Raises OSError, before
    the block where nothing can be written.
    """
    stages: list[Path] = []
    placed: list[Path] = []
    try:
        for folder, mode in wanted:
            stages.append(_stage(folder, mode))
        yield stages
        for stage, (folder, mode) in zip(stages, wanted, strict=True):
            for path in _appear(stage, folder, mode):
                placed.append(path)
    except BaseException:
        for path in [*placed, *stages]:
            with suppress(OSError):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        raise


def is_vacant(folder: Path) -> bool:
    """Whether `staged` may fill a folder: it is not there, or holds nothing but what a killed one left."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name in (_STAGE, "lost+found") for path in folder.iterdir())


def _stage(folder: Path, mode: int) -> Path:
    """Where a folder is filled: on its own file system, under a name that nobody looks for."""
    inside = folder.is_dir()
    stage = folder / _STAGE if inside else folder.with_name(f".{folder.name}.{os.getpid()}.part")
    if inside and stage.is_dir():
        shutil.rmtree(stage)
    make_folder(stage.parent)
    stage.mkdir(mode=mode)
    return stage


def _appear(stage: Path, folder: Path, mode: int) -> Iterator[Path]:
    """Give what was staged its names, durably; yields each."""
    if stage.parent == folder:
        if not mode & 0o077:
            with suppress(PermissionError):
                folder.chmod(mode)
        for path in sorted(stage.iterdir()):
            yield path.rename(folder / path.name)
        stage.rmdir()
        _sync_folder(folder)
    else:
        yield stage.rename(folder)
    _sync_folder(folder.parent)


def rename(path: Path, target: Path) -> None:
    """Give a file another name in its folder, durably. Raises OSError, also when there is such a file.

    Two processes at once could still replace one; hard links, which could not, do not exist on every stick.
    """
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    path.rename(target)
    _sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours with all that is in it."""
    shutil.rmtree(folder)
    _sync_folder(folder.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against another writer. Raises InputRejected when there is one."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputRejected(
                Reason.BAD_INPUT,
                f"{folder}: another edge-fleet is writing to this registry",
                "wait until it has ended, then run this again",
            ) from e
        yield
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def place(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Replace `path` durably by what `fill` writes, with the modes of the place: a USB stick has its own."""
    _place(path, None, fill)


def _place(path: Path, mode: int | None, fill: Callable[[IO[bytes]], object]) -> None:
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.part")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(part, flags, 0o666 if mode is None else mode), "wb") as out:
            if mode is not None:
                # FAT has no modes and some systems say so; keys.exposed tells whom it concerns.
                with suppress(PermissionError):
                    os.fchmod(out.fileno(), mode)
            fill(out)
            out.flush()
            os.fsync(out.fileno())
        part.rename(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _pump(stream: IO[bytes], out: IO[bytes], source: Path, expected: Content) -> None:
    digest = hashlib.sha256()
    size_bytes = 0
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
        size_bytes += len(chunk)
        out.write(chunk)
    if Content(size_bytes, digest.hexdigest()) != expected:
        raise BundleRejected(
            Reason.DIGEST_MISMATCH,
            f"{source}: changed while it was being copied",
            "let edge-optimize finish writing the bundle, then publish it again",
        )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
