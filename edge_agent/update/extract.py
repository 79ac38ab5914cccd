"""A part of a registry on a medium: a folder, a tar or a zip. It only reads, by exact name.

    contents.json        the versions on it, as a list; a hint, not believed
    metadata/…           signed, as in the registry
    blobs/sha256/ab/…    by digest, as in the registry
    desired/DEVICE.json  signed desired states, optional

Nothing is unpacked, so no name in an archive leads anywhere. How much of a file is read is bounded by the
reader.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from edge_agent.update.http import HttpStatus
from edge_contract.errors import InputRejected, Reason

CONTENTS = "contents.json"
PREFIX = "extract/"
_MEMBERS = 200_000
_CHUNK_BYTES = 256 << 10
_METADATA = re.compile(r"metadata/[A-Za-z0-9%_.-]+\.json")
_ORDER = re.compile(r"desired/([A-Za-z0-9][A-Za-z0-9._-]{0,63})\.json")
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class _Shelf(Protocol):
    """Files by name."""

    def open(self, name: str) -> IO[bytes] | None:
        """The file, or None. Raises OSError or one of _BROKEN."""

    def names(self) -> Iterable[str]:
        """What is there, as far as it is listed. Raises OSError."""


class Extract:
    """What is on the medium, to be read as if it were the registry."""

    def __init__(self, path: Path, shelf: _Shelf) -> None:
        self.path = path
        self._shelf = shelf

    def read(self, name: str, limit_bytes: int) -> bytes | None:
        """The file's bytes, or None when there is none. Raises InputRejected when it is longer or broken."""
        data = bytearray()
        found = False
        for chunk in self.chunks(name):
            found = True
            data += chunk
            if len(data) > limit_bytes:
                raise self._bad(f"{name} is longer than {limit_bytes} bytes")
        return bytes(data) if found else None

    def chunks(self, name: str) -> Iterator[bytes]:
        """The file, piece by piece; nothing when there is none, one empty piece when it is empty."""
        with self._told(name):
            stream = self._shelf.open(name)
            if stream is None:
                return
            with stream:
                yield b""
                while chunk := stream.read(_CHUNK_BYTES):
                    yield chunk

    def orders(self) -> list[str]:
        """Devices for which there is an order."""
        found = (_ORDER.fullmatch(name) for name in self._shelf.names())
        return sorted(match.group(1) for match in found if match)

    def stream(self, url: str) -> Iterator[bytes]:
        """Metadata, for edge_agent.update.trust."""
        name = url.removeprefix(PREFIX)
        pieces = self.chunks(name) if _METADATA.fullmatch(name) else iter(())
        first = next(pieces, None)
        if first is None:
            raise HttpStatus(f"{self.path}: {name}", 404)
        yield from pieces

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except _BROKEN as e:
            raise self._bad(f"{name} cannot be read: {e}") from e

    def _bad(self, what: str) -> InputRejected:
        return InputRejected(
            Reason.BAD_INPUT, f"{self.path}: {what}", "write it anew with `edge-fleet registry export`"
        )


@contextmanager
def opened(path: Path) -> Iterator[Extract]:
    """The medium for the length of a block. Raises InputRejected when it is none, OSError from the disk."""
    if path.is_dir():
        yield Extract(path, _Folder(path))
        return
    if not path.is_file():
        raise InputRejected(Reason.BAD_INPUT, f"{path}: no such file", "name the file on the medium")
    try:
        if _begins_as_zip(path):
            with zipfile.ZipFile(path) as archive:
                yield Extract(path, _Zip(archive))
            return
        with tarfile.open(path, "r:") as tar:  # not compressed: blobs are not, and a seek would unpack all
            yield Extract(path, _Tar(tar))
    except (tarfile.TarError, zipfile.BadZipFile) as e:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{path}: neither a zip nor an uncompressed tar archive ({e})",
            "name what `edge-fleet registry export` wrote; unpack it first if it is compressed",
        ) from e


def _begins_as_zip(path: Path) -> bool:
    """Not zipfile.is_zipfile, which looks at the end: a tar may end with an .npz."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def open(self, name: str) -> IO[bytes] | None:
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder) or not path.is_file():
            return None
        return path.open("rb")

    def names(self) -> Iterable[str]:
        return (str(path.relative_to(self._folder)) for path in self._folder.glob("desired/*"))


class _Tar:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        for count, member in enumerate(archive):
            if count >= _MEMBERS:
                raise tarfile.ReadError(f"more than {_MEMBERS} members")
            if member.isreg() and not member.issparse():
                self._members[member.name.removeprefix("./")] = member

    def open(self, name: str) -> IO[bytes] | None:
        member = self._members.get(name)
        return self._archive.extractfile(member) if member is not None else None

    def names(self) -> Iterable[str]:
        return self._members


class _Zip:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        if len(archive.infolist()) > _MEMBERS:
            raise zipfile.BadZipFile(f"more than {_MEMBERS} members")

    def open(self, name: str) -> IO[bytes] | None:
        try:
            return self._archive.open(name)
        except KeyError:
            return None

    def names(self) -> Iterable[str]:
        return self._archive.namelist()
