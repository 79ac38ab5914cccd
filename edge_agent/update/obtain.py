"""A source of missing blobs: by the shortest encoding that this device can use, whole on any doubt.

It runs in the fetch child and starts a decode child for each encoding. What is fetched was signed by
digest, the base is hashed before it is used and the result after; a patch that is damaged, whose base is,
or whose decoder fails or crashes costs time and is reported, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from edge_agent import files
from edge_agent.update.children import Child, Ended
from edge_agent.update.decode import INTERPRETER_BYTES
from edge_agent.update.download import BlobMissing, Downloader
from edge_agent.update.encodings import after_failure, ranked
from edge_agent.update.leash import Limits
from edge_agent.update.source import FullBlobs
from edge_agent.update.staging import PART, Staging
from edge_agent.update.store import file_matches, hash_file
from edge_contract.encodings import Encoding, Encodings
from edge_contract.errors import BundleRejected, EdgewardError, Reason, StorageFault
from edge_contract.manifest import File, blob_path

_DECODE_TIMEOUT_S = 900.0
_LOOK_EVERY_S = 0.02
_DECODED = ".decoded"
# What is on offer; a sentence says why that is not known.
Offers = Encodings | str | None
# Called with the bytes that are still to come, and why these are more than before.
Replanned = Callable[[int, str], None]


class Means(NamedTuple):
    """What this device has to decode with: stored files by the digest that they should have, algorithms."""

    bases: dict[str, Path]
    reads: frozenset[str]
    memory_bytes: int


class _Useless(Exception):
    """An encoding did not work out; the blob has to come in another way."""


class Obtainer:
    """One for the missing blobs of one version. The holder of the staging folder's lock uses it."""

    def __init__(
        self,
        staging: Staging,
        downloader: Downloader,
        means: Means,
        blobs: Iterable[File],
        offers: Offers,
        replanned: Replanned,
    ) -> None:
        self._staging = staging
        self._downloader = downloader
        self._whole = FullBlobs(downloader)
        self._means = means
        self._replanned = replanned
        self._blobs = list(blobs)
        self._left = {blob.sha256: blob for blob in self._blobs}
        self._doubts: list[str] = []
        self._saved_bytes = 0
        if isinstance(offers, str):
            self._doubts.append(offers)
            offers = None
        self._ways = {blob.sha256: self._usable(blob, offers) for blob in self._blobs}

    @property
    def encoded(self) -> list[File]:
        """The encoded blobs that are to be fetched, as files of the staging folder."""
        return [_file(ways[0]) for ways in self._ways.values() if ways]

    @property
    def coming_bytes(self) -> int:
        """What is still to be fetched, by the ways that are chosen now."""
        return sum(self._rest(blob) for blob in self._left.values())

    def coming_bytes_beside(self, blob: File) -> int:
        """The same without one blob."""
        return self.coming_bytes - (self._rest(blob) if blob.sha256 in self._left else 0)

    def give_up(self, why: str) -> None:
        """Fetch everything whole."""
        self._ways = {sha256: [] for sha256 in self._ways}
        self._doubt(why)

    def obtain(self, blob: File) -> Path:
        """The file with exactly the blob's content: see source.Source."""
        done = self._obtained(blob)
        self._left.pop(blob.sha256, None)
        return done

    def summary(self) -> str:
        """What encodings saved, and why some did not; empty when there were none."""
        parts = []
        if self._saved_bytes:
            whole = sum(blob.size_bytes for blob in self._blobs)
            parts.append(f"fetched {whole - self._saved_bytes} bytes instead of {whole}")
        return "; ".join([*parts, *(f"not by an encoding: {doubt}" for doubt in self._doubts)])

    def _obtained(self, blob: File) -> Path:
        while ways := self._ways[blob.sha256]:
            try:
                done = self._decoded(blob, ways[0])
            except (_Useless, EdgewardError) as e:
                if isinstance(e, EdgewardError) and not is_doubt(e):
                    raise
                self._ways[blob.sha256] = after_failure(ways[1:])
                self._doubt(f"{blob.name}: {e}")
            else:
                self._saved_bytes += blob.size_bytes - ways[0].size_bytes
                return done
        return self._whole.obtain(blob)

    def _doubt(self, why: str) -> None:
        self._doubts.append(why)
        self._replanned(self.coming_bytes, why)

    def _usable(self, blob: File, offers: Encodings | None) -> list[Encoding]:
        """Ways that are also shorter than what an earlier attempt left to do of the whole blob."""
        means = self._means
        found = ranked(
            blob.size_bytes,
            offers.of(blob.sha256) if offers else [],
            bases=means.bases,
            reads=means.reads,
            memory_bytes=means.memory_bytes,
        )
        return [e for e in found if e.size_bytes < blob.size_bytes - self._staging.begun_bytes(blob)]

    def _rest(self, blob: File) -> int:
        ways = self._ways[blob.sha256]
        file = _file(ways[0]) if ways else blob
        if self._staging.whole(file) is not None:
            return 0
        return file.size_bytes - self._staging.begun_bytes(file)

    def _decoded(self, blob: File, encoding: Encoding) -> Path:
        base = self._means.bases[encoding.base_sha256] if encoding.base_sha256 else None
        if base is not None and hash_file(base) != encoding.base_sha256:
            raise _Useless(f"the stored file {base} is damaged, no patch applies to it")
        encoded = self._downloader.fetch(blob_path(encoding.sha256), encoding.sha256, encoding.size_bytes)
        folder = self._staging.folder
        result, done = folder / f"{blob.sha256}{_DECODED}", folder / blob.sha256
        # The result takes the space that was reserved for the whole blob.
        files.remove_link(folder / f"{blob.sha256}{PART}")
        try:
            self._run(encoding, encoded, base, result, blob)
            if not file_matches(result, blob):
                raise _Useless(f"the {encoding.algorithm} encoding did not make the blob")
            files.sync_file(result)
            files.move(result, done)
        finally:
            self._staging.drop({encoding.sha256})
        return done

    def _run(self, encoding: Encoding, encoded: Path, base: Path | None, result: Path, blob: File) -> None:
        arguments = ["decode", encoding.algorithm, str(encoded), str(result)]
        arguments += [str(blob.size_bytes), blob.sha256, str(encoding.memory_bytes)]
        arguments += ["--base", str(base)] if base else []
        limits = Limits(
            memory_bytes=INTERPRETER_BYTES + encoding.memory_bytes, confined=True, expendable=True
        )
        ended = _wait(Child(arguments, timeout_s=_DECODE_TIMEOUT_S, limits=limits))
        if ended.code == 0 and ended.last.get("event") == "done":
            return
        files.remove_link(result)
        reason, problem = ended.failure()
        if ended.code == StorageFault.exit_code:
            raise StorageFault(reason, problem, "free space or repair the disk; the device tries again")
        raise _Useless(problem)


def encoded_digests(blobs: Iterable[File], offers: Offers) -> set[str]:
    """Of everything that is on offer for these, also of what an earlier attempt has fetched."""
    if not isinstance(offers, Encodings):
        return set()
    return {encoding.sha256 for blob in blobs for encoding in offers.of(blob.sha256)}


def is_doubt(error: EdgewardError) -> bool:
    """Whether an error is about what the registry has under a name, so that another name may do better.

    A network that is away says nothing about the encoding, and would bring the whole blob no sooner.
    """
    return isinstance(error, BlobMissing | BundleRejected) or error.reason is Reason.DIGEST_MISMATCH


def _file(encoding: Encoding) -> File:
    return File("model", encoding.sha256, encoding.size_bytes, encoding.sha256)


def _wait(child: Child) -> Ended:
    while (ended := child.ended()) is None:
        time.sleep(_LOOK_EVERY_S)
    return ended
