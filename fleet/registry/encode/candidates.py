"""Every encoding of one blob, tried and measured, and which of them are worth publishing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from edge_contract import encodings
from fleet.registry.encode import lanes, zstd

# A patch that saves less is not worth a second way for things to go wrong.
PATCH_SHARE = 0.7
# Compressing weights seldom saves more than some percent; below this it costs more than it brings.
WHOLE_SHARE = 0.98
# A patch that is only this much shorter than one that needs less memory and no package is not kept.
_BETTER_SHARE = 0.95
# Encoding holds a blob and its base many times over.
MOST_BYTES = 256 << 20


class Candidate(NamedTuple):
    """An encoded blob. `memory_bytes` is what decoding takes."""

    algorithm: str
    data: bytes
    memory_bytes: int

    @property
    def size_bytes(self) -> int:
        return len(self.data)


def whole(new: bytes) -> Candidate:
    """The blob, compressed."""
    return Candidate(encodings.ZSTD, *zstd.whole(new))


def patches(base: bytes, new: bytes) -> Iterator[Candidate]:
    """The patches that make `new` from `base`."""
    yield Candidate(encodings.LANES, *lanes.patch(base, new))
    frame = zstd.patch(base, new)
    if frame is not None:
        yield Candidate(encodings.ZSTD_PATCH, *frame)


def worthwhile_whole(found: Candidate, size_bytes: int) -> bool:
    """Whether the compressed blob is worth offering beside the blob of `size_bytes`."""
    return found.size_bytes < size_bytes * WHOLE_SHARE


def worthwhile_patches(found: Sequence[Candidate], full_bytes: int) -> list[Candidate]:
    """The useful patches from one base: well below the shortest whole form, and none that another outdoes.

    A patch that takes more memory stays only if it is clearly shorter: devices differ in what they have.
    """
    kept: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: c.memory_bytes):
        least = min((c.size_bytes * _BETTER_SHARE for c in kept), default=full_bytes * PATCH_SHARE)
        if candidate.size_bytes < least:
            kept.append(candidate)
    return kept
