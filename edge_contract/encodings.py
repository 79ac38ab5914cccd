"""Pure: shorter ways to bring the blobs of a published version to a device, as one signed document.

The manifest says what a version is and never changes; this document says how its blobs can be had for
fewer bytes, and grows when it becomes known what devices run. Nothing here compresses or patches.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_contract import canonical
from edge_contract.errors import BundleRejected, Reason
from edge_contract.manifest import Digest, Name, Size, Version

LIMIT_BYTES = 1 << 20
SUFFIX = "~encodings.json"

# The blob as one Zstandard frame (RFC 8878).
ZSTD = "zstd"
# A Zstandard frame whose window begins with the base (`zstd --patch-from`).
ZSTD_PATCH = "zstd-patch"
# Differences to aligned regions of the base, by the width of its numbers: docs/deltas.md has the format.
LANES = "lanes"
# Algorithms of this version of edgeward. A device passes over others, so that more can be added.
WHOLE = frozenset({ZSTD})
PATCHES = frozenset({ZSTD_PATCH, LANES})


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Encoding(_Strict, frozen=True):
    """One encoded blob at `blobs/sha256/…`. A patch names the blob it applies to as `base_sha256`.

    `memory_bytes` bounds what decoding allocates beside the interpreter itself.
    """

    algorithm: Name
    sha256: Digest
    size_bytes: Annotated[int, Meta(ge=1, le=1 << 40)]
    memory_bytes: Size
    base_sha256: Digest | None = None


class EncodedBlob(_Strict, frozen=True):
    """A blob of the manifest, by digest and size, and what decodes to it."""

    sha256: Digest
    size_bytes: Size
    encodings: Annotated[list[Encoding], Meta(max_length=64)]


class Encodings(_Strict, frozen=True):
    """Everything on offer for `name`@`version`, whose manifest has the digest `manifest_sha256`."""

    schema: Literal[1]
    name: Name
    version: Version
    manifest_sha256: Digest
    blobs: Annotated[list[EncodedBlob], Meta(max_length=64)]

    def of(self, sha256: str) -> list[Encoding]:
        """What is on offer for one blob."""
        return [e for blob in self.blobs if blob.sha256 == sha256 for e in blob.encodings]


def target_name(name: str, version: str) -> str:
    """The TUF target that carries the encodings of `name`@`version`.

    It lies beside the manifest's, so that the same role signs it; no version has a `~` in its name.
    """
    return f"models/{name}/{version}{SUFFIX}"


def to_bytes(document: Encodings) -> bytes:
    """Canonical bytes."""
    return canonical.to_bytes(document)


def from_bytes(data: bytes) -> Encodings:
    """Decode and check. Raises BundleRejected naming the offending field."""
    try:
        document = canonical.from_bytes(data, Encodings, limit_bytes=LIMIT_BYTES)
        _check(document)
    except canonical.DecodeFault as e:
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"encodings: {e.problem} at {e.path}",
            "make them anew with `edge-fleet registry deltas`",
        ) from e
    return document


def _check(document: Encodings) -> None:
    """What types alone cannot say."""
    seen: set[str] = set()
    for i, blob in enumerate(document.blobs):
        if blob.sha256 in seen:
            raise canonical.DecodeFault(f"$.blobs[{i}].sha256", "the blob is listed twice")
        seen.add(blob.sha256)
        for j, encoding in enumerate(blob.encodings):
            _check_encoding(f"$.blobs[{i}].encodings[{j}]", blob, encoding)


def _check_encoding(path: str, blob: EncodedBlob, encoding: Encoding) -> None:
    based = encoding.base_sha256 is not None
    if (encoding.algorithm in PATCHES and not based) or (encoding.algorithm in WHOLE and based):
        problem = f"{encoding.algorithm} {'needs no' if based else 'needs a'} base"
        raise canonical.DecodeFault(f"{path}.base_sha256", problem)
    if encoding.base_sha256 == blob.sha256:
        raise canonical.DecodeFault(f"{path}.base_sha256", "a blob is no base of itself")
    if encoding.size_bytes >= blob.size_bytes:
        raise canonical.DecodeFault(f"{path}.size_bytes", "not smaller than the blob itself")
