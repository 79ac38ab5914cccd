"""Pure: what to ask a registry for one blob, and what its answer means. Headers in, decisions out.

A blob's address is its digest, so a resumption is judged by the digest of the whole. Entity tags only tell
early, and only those that this process has seen are sent: docs/decisions/0007-resumption-by-digest.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum

from edge_agent.update.pacing import retry_after_s
from edge_contract.errors import BundleRejected, EdgewardError, Reason, TransferFailed

NEXT_STEP = "the device tries again by itself; check the network and the registry if this repeats"
# Statuses that say "later"; every other 4xx is final for this attempt.
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_NO_ENTRY = frozenset({401, 403, 407})
_BAD_RANGE = 416
# One may be this disk's fault after a power cut, another a server's that changed meanwhile.
_MISFITS = 2
_SPAN = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Next(Enum):
    """What to do with the body of an answer."""

    APPEND = "append"  # it begins where the part ends
    BEGIN_ANEW = "begin_anew"  # it is the whole blob
    ASK_AGAIN = "ask_again"  # leave it: another question does better


class BlobMissing(EdgewardError):
    """The registry refuses a blob it names: final for this attempt, retried as a transfer later."""

    exit_code = TransferFailed.exit_code


class Postponed(TransferFailed):
    """Nothing more for now: this process ends, and `retry_after_s` says when the next may try, if known."""

    def __init__(self, reason: Reason, what: str, next_step: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason, what, next_step)
        self.retry_after_s = retry_after_s


class BeginAnew(TransferFailed):
    """What came was thrown away; a new beginning is worth it."""


class TooLong(TransferFailed):
    """More came than belongs to the blob, so that what came is no progress."""


class Later(TransferFailed):
    """A status that says "later", perhaps when."""

    def __init__(self, reason: Reason, what: str, next_step: str, retry_after_s: float | None) -> None:
        super().__init__(reason, what, next_step)
        self.retry_after_s = retry_after_s


class Dialogue:
    """Questions and answers for one blob of `size_bytes`; `url` is for people."""

    def __init__(self, url: str, sha256: str, size_bytes: int) -> None:
        self._url = url
        self._sha256 = sha256
        self._size_bytes = size_bytes
        self._tag = ""  # the strong entity tag that the server gave last
        self._ranges = True
        self._distrusted = 0
        self._misfits = 0

    def headers(self, have: int) -> dict[str, str]:
        """What to ask with when `have` bytes are here."""
        asked = {"Accept-Encoding": "identity"}
        if self._distrusted:
            asked |= {"Cache-Control": "no-cache"}  # a copy on the way may be the damaged one
        if have and self._ranges:
            asked |= {"Range": f"bytes={have}-"}
            if self._tag:
                asked |= {"If-Range": self._tag}
        return asked

    def accept(self, status: int, headers: Mapping[str, str], have: int, now_s: float) -> Next:
        """What the answer's body is good for. Raises TransferFailed or BlobMissing; `now_s` is Unix time."""
        if status not in (200, 206):
            self._ranges = self._ranges and status != _BAD_RANGE
            raise self._refused(status, headers.get("Retry-After"), have, now_s)
        encoding = headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise self._wrong(f"comes encoded as {encoding}, which was not asked for")
        tag = _strong(headers.get("ETag", ""))
        if status == 206:
            self._check_span(headers.get("Content-Range", ""), tag, have)
            self._tag = tag
            return Next.APPEND
        self._check_length(headers.get("Content-Length", ""))
        changed, self._tag = bool(have and self._tag and tag != self._tag), tag
        if changed:
            # Another tag for the same digest: another of the servers behind this name, or a copy with a new
            # date. Without If-Range it will send the rest.
            self._tag = ""
            return Next.ASK_AGAIN
        return Next.BEGIN_ANEW if have else Next.APPEND

    def ended_early(self, have: int) -> TransferFailed:
        """The body ended before the blob did."""
        return self._wrong(f"ended after {have} of {self._size_bytes} bytes", Reason.REGISTRY_UNREACHABLE)

    def too_long(self) -> TooLong:
        """The body goes on after the blob's end."""
        self._ranges = False
        what = f"{self._url} sends more than the {self._size_bytes} bytes that signed metadata allows"
        return TooLong(Reason.DIGEST_MISMATCH, what, NEXT_STEP)

    def wrong_content(self, sha256: str, *, in_one_piece: bool) -> EdgewardError:
        """All bytes are here with another digest; the second time in one piece, the registry is to blame."""
        what = f"{self._url} has SHA-256 {sha256[:12]}…, signed metadata says {self._sha256[:12]}…"
        if in_one_piece:
            self._distrusted += 1
            if self._distrusted == 1:
                return BeginAnew(Reason.DIGEST_MISMATCH, what, "it is fetched once more, past all caches")
            step = "publish the bundle again, and look for who altered the registry's files"
            return BundleRejected(Reason.DIGEST_MISMATCH, what, step)
        self._misfits += 1
        kind = BeginAnew if self._misfits <= _MISFITS else Postponed
        pieces = f"what came in pieces of {self._url} does not make the blob"
        return kind(Reason.DIGEST_MISMATCH, pieces, "it is fetched again from the start")

    def _check_span(self, text: str, tag: str, have: int) -> None:
        span = _SPAN.fullmatch(text.strip())
        total = span.group(3) if span else ""
        fits = span is not None and int(span.group(1)) == have and total in ("*", str(self._size_bytes))
        asked = have > 0 and self._ranges
        if asked and fits and (not self._tag or tag == self._tag):
            return
        self._ranges, self._tag = False, ""
        if asked and fits:
            raise self._wrong("has become another file since the transfer began (another entity tag)")
        raise self._wrong(f"answered with a part that was not asked for ({text or 'no Content-Range'})")

    def _check_length(self, text: str) -> None:
        """A login page of the network is seldom as long as the blob; what is here already outlives it."""
        if text.strip().isdigit() and int(text) != self._size_bytes:
            raise self._wrong(f"has {int(text)} bytes, signed metadata says {self._size_bytes}")

    def _wrong(self, what: str, reason: Reason = Reason.DIGEST_MISMATCH) -> TransferFailed:
        return TransferFailed(reason, f"{self._url} {what}", NEXT_STEP)

    def _refused(self, status: int, retry_after: str | None, have: int, now_s: float) -> EdgewardError:
        what = f"{self._url} answered {status}"
        if status in AGAIN:
            asked_s = retry_after_s(retry_after, now_s)
            return Later(Reason.REGISTRY_UNREACHABLE, what, NEXT_STEP, asked_s)
        if status == _BAD_RANGE and have:
            return TransferFailed(Reason.DIGEST_MISMATCH, f"{what}: its file is shorter", NEXT_STEP)
        if status in _NO_ENTRY:
            return BlobMissing(
                Reason.NOT_ALLOWED,
                f"{what}: it does not let this device in",
                "check [registry] token_file or tls_cert, and the proxy's login in the environment",
            )
        if 300 <= status < 400:
            return TransferFailed(Reason.REGISTRY_UNREACHABLE, f"{what} without an address", NEXT_STEP)
        return BlobMissing(
            Reason.BLOB_MISSING,
            what,
            "publish the bundle again: signed metadata names this blob, but the registry does not have it",
        )


def _strong(tag: str) -> str:
    """An entity tag that promises equal bytes; `W/"…"` does not."""
    return tag if tag.startswith('"') else ""
