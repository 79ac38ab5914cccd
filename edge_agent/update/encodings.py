"""Pure: which encoding of a missing blob to fetch. Nothing is fetched or decoded here."""

from __future__ import annotations

from collections.abc import Container, Iterable

from edge_contract.encodings import Encoding


def ranked(
    size_bytes: int,
    offers: Iterable[Encoding],
    *,
    bases: Container[str],
    reads: Container[str],
    memory_bytes: int,
) -> list[Encoding]:
    """Encodings of a blob of `size_bytes` that this device can use, shortest first.

    `bases` are the digests of the blobs that it has, `reads` the algorithms that it can decode, and
    `memory_bytes` is what a decoder may allocate. The whole blob is always possible and not listed.
    """
    usable = [
        e
        for e in offers
        if e.algorithm in reads
        and e.memory_bytes <= memory_bytes
        and e.size_bytes < size_bytes
        and (e.base_sha256 is None or e.base_sha256 in bases)
    ]
    return sorted(usable, key=lambda e: (e.size_bytes, e.memory_bytes, e.sha256))


def after_failure(rest: Iterable[Encoding]) -> list[Encoding]:
    """What is still worth trying when one encoding failed: no patch, for its base may be the culprit."""
    return [e for e in rest if e.base_sha256 is None]
