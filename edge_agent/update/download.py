"""Download of one blob: resumes, verifies as it goes, never leaves a wrong file under a right name.

HTTP through urllib3. It runs in the fetch child. Which blobs are wanted is not decided here.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Timeout

from edge_agent import files
from edge_agent.config import Registry
from edge_agent.update.store import hash_file
from edge_contract.console import os_fault
from edge_contract.errors import BundleRejected, EdgewardError, Reason, TransferFailed

_CHUNK_BYTES = 64 << 10
# A cut loses the chunk that was being received. Small, so that a bad network still gets on.
_RECEIVE_BYTES = 8 << 10
_BACKOFF_CAP_S = 30.0
# Statuses that say "later"; every other 4xx is final for this attempt.
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
Progress = Callable[[int], None]


class Downloader:
    """Fetches blobs of known size and digest from one registry into a staging folder."""

    def __init__(self, registry: Registry, staging: Path, progress: Progress) -> None:
        self._registry = registry
        self._staging = staging
        self._progress = progress
        timeout = Timeout(connect=registry.timeout_s, read=registry.timeout_s)
        self._pool = urllib3.PoolManager(timeout=timeout, retries=False)

    def fetch(self, path: str, sha256: str, size_bytes: int) -> Path:
        """The staged file with exactly that content, synced.

        Raises TransferFailed, BundleRejected (served bytes have another digest) or StorageFault.
        """
        done = self._staging / sha256
        part = self._staging / f"{sha256}.part"
        if done.exists() and hash_file(done) == sha256:
            return done
        for attempt in range(self._registry.retries):
            if attempt:
                time.sleep(random.uniform(0, min(_BACKOFF_CAP_S, 0.5 * 2**attempt)))  # noqa: S311 - full jitter
            try:
                self._attempt(f"{self._registry.url.rstrip('/')}/{path}", part, sha256, size_bytes)
                break
            except TransferFailed:
                if attempt + 1 == self._registry.retries:
                    raise
            except OSError as e:
                raise os_fault(e) from e
        files.sync_file(part)
        files.move(part, done)
        return done

    def _attempt(self, url: str, part: Path, sha256: str, size_bytes: int) -> None:
        part.touch()  # an empty blob has nothing to receive
        digest, have = _resume(part, size_bytes)
        resumed = have > 0
        if have < size_bytes:
            # The name is the content's digest, so a changed blob has another URL; the digest is checked
            # over all bytes at the end, so If-Range with this ETag is an optimisation, not the guard.
            headers = {"Range": f"bytes={have}-", "If-Range": f'"{sha256}"'} if have else {}
            try:
                response = self._pool.request(
                    "GET", url, headers={**headers, "Accept-Encoding": "identity"}, preload_content=False
                )
                with _closing(response):
                    have, digest = self._start(url, response, have, digest)
                    resumed = have > 0
                    self._receive(url, response, part, have, digest, size_bytes)
            except HTTPError as e:
                raise _unreachable(url, e) from e
        if digest.hexdigest() != sha256:
            part.unlink(missing_ok=True)
            if resumed:  # the beginning was not synced: after a power cut this disk may be the culprit
                raise TransferFailed(
                    Reason.DIGEST_MISMATCH,
                    f"what an earlier attempt left of {url} was damaged",
                    "it is fetched again from the start",
                )
            raise BundleRejected(
                Reason.DIGEST_MISMATCH,
                f"{url} has SHA-256 {digest.hexdigest()[:12]}…, signed metadata says {sha256[:12]}…",
                "publish the bundle again, and look for who altered the registry's files",
            )

    def _start(
        self, url: str, response: urllib3.BaseHTTPResponse, have: int, digest: hashlib._Hash
    ) -> tuple[int, hashlib._Hash]:
        """Offset and running digest at which this response's body begins."""
        if response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            return have, digest
        if response.status == 200:
            return 0, hashlib.sha256()
        raise _refused(url, response.status)

    def _receive(
        self,
        url: str,
        response: urllib3.BaseHTTPResponse,
        part: Path,
        offset: int,
        digest: hashlib._Hash,
        size_bytes: int,
    ) -> None:
        started, at_start = time.monotonic(), offset
        try:
            with part.open("r+b" if offset else "wb") as stream:
                stream.seek(offset)
                for chunk in response.stream(_RECEIVE_BYTES):
                    if offset + len(chunk) > size_bytes:
                        raise _oversize(url, size_bytes)
                    stream.write(chunk)
                    digest.update(chunk)
                    offset += len(chunk)
                    self._progress(len(chunk))
                    self._pace(offset - at_start, started)
                stream.truncate(offset)
        except OSError as e:
            raise os_fault(e) from e
        if offset < size_bytes:
            raise TransferFailed(
                Reason.REGISTRY_UNREACHABLE,
                f"{url} ended after {offset} of {size_bytes} bytes",
                "the device resumes by itself; check the network if this repeats",
            )

    def _pace(self, received: int, started: float) -> None:
        limit = self._registry.max_rate_bytes_per_s
        if limit:
            ahead = received / limit - (time.monotonic() - started)
            if ahead > 0:
                time.sleep(ahead)


def _resume(part: Path, size_bytes: int) -> tuple[hashlib._Hash, int]:
    """Digest and length of what an earlier attempt left; nothing when it is longer than the blob."""
    digest = hashlib.sha256()
    if part.stat().st_size > size_bytes:
        part.write_bytes(b"")
    have = 0
    with part.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            have += len(chunk)
    return digest, have


@contextmanager
def _closing(response: urllib3.BaseHTTPResponse) -> Iterator[None]:
    """Keep the connection for the next blob only when the body was read to its end."""
    try:
        yield
    except BaseException:
        response.close()
        raise
    response.release_conn()


def _unreachable(url: str, error: Exception) -> TransferFailed:
    return TransferFailed(
        Reason.REGISTRY_UNREACHABLE,
        f"{url} cannot be fetched: {error}",
        "check the network and the registry; the device tries again by itself",
    )


def _refused(url: str, status: int) -> EdgewardError:
    if status in _AGAIN:
        return TransferFailed(
            Reason.REGISTRY_UNREACHABLE,
            f"{url} answered {status}",
            "the device tries again by itself; check the registry if this repeats",
        )
    return BlobMissing(
        Reason.BLOB_MISSING,
        f"{url} answered {status}",
        "publish the bundle again: signed metadata names this blob, but the registry does not have it",
    )


def _oversize(url: str, size_bytes: int) -> BundleRejected:
    return BundleRejected(
        Reason.DIGEST_MISMATCH,
        f"{url} sends more than the {size_bytes} bytes that signed metadata allows",
        "publish the bundle again, and look for who altered the registry's files",
    )


class BlobMissing(EdgewardError):
    """The registry does not have a blob it names: final for this attempt, retried as a transfer later."""

    exit_code = TransferFailed.exit_code
