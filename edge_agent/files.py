"""Durable file operations: the only module of the agent that renames, links or syncs.

After each function returns, a power cut leaves its whole effect; before, none of it or a leftover
that the next call cleans up. Every operating-system error leaves as StorageFault, naming the path.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_contract.console import os_fault
from edge_contract.errors import StorageFault

_TEMPORARY = ".tmp"
_ASIDE = ".damaged-"
_FALLOC_FL_KEEP_SIZE = 1
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What a filesystem or kernel without the exchange of two names answers.
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})


@contextmanager
def _storage(subject: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.filename is None:  # write and fsync know only a descriptor
            e.filename = str(subject)
        raise os_fault(e) from e


def make_folder(path: Path, mode: int = 0o750) -> None:
    """Create `path` and its parents, durably; an existing folder is left alone."""
    with _storage(path):
        missing = [p for p in (path, *path.parents) if not p.exists()]
        if not missing:
            return
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        for folder in missing:
            _sync_folder(folder.parent)


def write(path: Path, data: bytes, mode: int = 0o640) -> None:
    """Replace `path` by `data` as one step: write beside it, sync, rename, sync the folder."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    with _storage(path):
        try:
            _write_synced(temporary, data, mode)
            os.replace(temporary, path)  # noqa: PTH105 - one spelling of the syscall, easy to find
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def read(path: Path) -> bytes | None:
    """The content of `path`, or None when there is no such file."""
    with _storage(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def stamp(path: Path) -> tuple[int, int, int]:
    """Another value after each `write` of `path`; zeros while there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


def install_folder(built: Path, final: Path) -> None:
    """Move a finished folder to `final`: its filesystem is synced first, so the name implies the content.

    When `final` exists already (same digest, so same content), `built` is dropped.
    """
    with _storage(final):
        _sync_tree(built)
        if final.exists():
            shutil.rmtree(built)
            return
        os.rename(built, final)  # noqa: PTH104
        _sync_folder(final.parent)


def replace_folder(built: Path, final: Path) -> None:
    """Put a finished folder in the place of a damaged one; the name never leads nowhere in between.

    Where the filesystem cannot exchange two names, it does for a moment.
    """
    with _storage(final):
        _sync_tree(built)
        try:
            _exchange(built, final)
        except OSError as e:
            if e.errno not in _NO_EXCHANGE:
                raise
            remove_tree(final)
            os.rename(built, final)  # noqa: PTH104
        _sync_folder(final.parent)
        if built.exists():
            shutil.rmtree(built)


def move(source: Path, target: Path) -> None:
    """Rename a file whose content is already synced, and make the new name durable."""
    with _storage(target):
        os.replace(source, target)  # noqa: PTH105
        _sync_folder(target.parent)


def swap_link(link: Path, target: str) -> None:
    """Point the symlink `link` to `target` in one step. A leftover of a cut-off swap is cleaned first."""
    temporary = link.with_name(f".{link.name}{_TEMPORARY}")
    make_folder(link.parent)
    with _storage(link):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)  # noqa: PTH105
        _sync_folder(link.parent)


def remove_link(link: Path) -> None:
    """Remove a symlink or file, if it is there, durably."""
    with _storage(link):
        link.unlink(missing_ok=True)
        if link.parent.exists():
            _sync_folder(link.parent)


def link_target(link: Path) -> str | None:
    """Last component of what a symlink points at (a digest in the store), or None without a link.

    Something else than a link under this name is as good as none. A disk that does not answer is not:
    then StorageFault is raised, and nobody may conclude that nothing serves.
    """
    with _storage(link):
        try:
            return Path(os.readlink(link)).name  # noqa: PTH115
        except FileNotFoundError:
            return None
        except OSError as e:
            if e.errno == errno.EINVAL:  # not a link
                return None
            raise


def names(folder: Path) -> list[str]:
    """What lies in `folder`, sorted; nothing when there is no such folder."""
    with _storage(folder):
        try:
            return sorted(os.listdir(folder))  # noqa: PTH208 - names are wanted, and one system call
        except (FileNotFoundError, NotADirectoryError):
            return []


def hard_link(source: Path, target: Path) -> None:
    """Give the content of `source` a second name; falls back to a copy where links are not allowed."""
    with _storage(target):
        try:
            os.link(source, target)
        except PermissionError:
            shutil.copyfile(source, target)


def remove_tree(path: Path) -> None:
    """Remove a folder and all below it. The name goes first, so a cut leaves no half version."""
    with _storage(path):
        if not path.exists():
            return
        doomed = path.with_name(f".{path.name}{_TEMPORARY}")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)  # noqa: PTH104
        _sync_folder(path.parent)
        shutil.rmtree(doomed)


def temporary(path: Path) -> Path:
    """Where something is built that will be renamed to `path`; `remove_leftovers` drops what was not."""
    return path.with_name(f".{path.name}{_TEMPORARY}")


def remove_leftovers(folder: Path) -> None:
    """Remove what cut-off operations left in `folder`."""
    with _storage(folder):
        if not folder.exists():
            return
        for name in names(folder):
            path = folder / name
            if not (name.startswith(".") and name.endswith(_TEMPORARY)):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def set_aside(path: Path, stamp: int, folder: Path | None = None) -> Path:
    """Rename a damaged file so that it can be looked at later; returns its new name, in `folder` if given.

    Of each name the newest two are kept: a disk that goes on damaging must not be filled by it.
    """
    folder = folder or path.parent
    while (aside := folder / f"{path.name}{_ASIDE}{stamp}").exists():
        stamp += 1  # a clock that does not run gives every start the same stamp
    move(path, aside)
    if folder != path.parent:
        sync_folder(path.parent)
    with suppress(StorageFault):  # the next one that is set aside tries again
        _drop_older(aside, path.name)
    return aside


def _drop_older(newest: Path, name: str) -> None:
    stamps = (n.removeprefix(f"{name}{_ASIDE}") for n in names(newest.parent))
    others = sorted(int(s) for s in stamps if s.isdecimal() and f"{name}{_ASIDE}{s}" != newest.name)
    for stamp in others[:-1]:
        remove_link(newest.with_name(f"{name}{_ASIDE}{stamp}"))


def sync_file(path: Path) -> None:
    """Make the content of `path` durable."""
    with _storage(path):
        _sync_file(path)


def sync_data(descriptor: int, path: Path) -> None:
    """Make what was written to an open file durable, with its length."""
    with _storage(path):
        os.fdatasync(descriptor)


def reserve(descriptor: int, path: Path, size_bytes: int) -> bool:
    """Take the disk's blocks for a file of `size_bytes` now, leaving its length as it is.

    fallocate(2) with FALLOC_FL_KEEP_SIZE, which Python's os does not offer; where the filesystem cannot do
    it (FAT on some kernels, UBIFS, NFS), returns False. Raises StorageFault when there is no room.
    """
    if size_bytes == 0:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", None) or libc.fallocate  # musl has 64 bits under the short name
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(descriptor, _FALLOC_FL_KEEP_SIZE, 0, size_bytes) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        if code != errno.EINTR:
            raise os_fault(OSError(code, os.strerror(code), str(path)))
    return True


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable."""
    with _storage(path):
        _sync_folder(path)


def lock(path: Path) -> int:
    """Wait for the exclusive lock on `path`; held until the process ends or the descriptor is closed.

    A fetch child that outlived its killed parent must not write beside its successor.
    """
    with _storage(path):
        descriptor = _open_lock(path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor


def try_lock(path: Path) -> int | None:
    """The exclusive lock on `path` if nobody holds it, else None."""
    with _storage(path):
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """The exclusive lock on `path` for the length of a block; False when somebody else holds it."""
    descriptor = try_lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes an unprivileged user can still write on the filesystem of `path`."""
    with _storage(path):
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


def _open_lock(path: Path) -> int:
    """A lock needs no writing: on a disk that takes none, an old lock file or else its folder will do."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as e:
        if e.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _write_synced(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(built: Path) -> None:
    for folder, _, found in os.walk(built):
        for name in found:
            _sync_file(Path(folder) / name)
        _sync_folder(Path(folder))
    _syncfs(built)


def _syncfs(path: Path) -> None:
    """syncfs(2), which Python's os does not offer: one flush for all files of a new version."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _call("syncfs", path, descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE, which Python's os does not offer: two names change places."""
    _call("renameat2", b, _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)


def _call(name: str, subject: Path, *arguments: int | bytes) -> None:
    """A function of the C library, tried again when a signal cut it off, as Python does for its own."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(subject))
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), str(subject))
