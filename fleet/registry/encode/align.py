"""Which region of the base each block of the result is best made from.

Weights that all moved a little have no long equal runs, so a search for matches does not find them;
but they lie where they lay, or all shifted by the same distance. So distances are tried first, block
by block, and a suffix sort (bsdiff's, through bsdiff4) is made only for what is left. The distances it
finds, at names and shapes between the weights, are tried in turn.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import bsdiff4.core
import numpy as np

from edge_contract.lanes import WIDTH, Mode
from fleet.registry.encode import cost
from fleet.registry.encode.cost import Bytes, Choice

_BLOCK_BYTES = 4096
# An aligned block must save this share of what the literal bytes cost.
_MOST_SHARE = 0.9
# Suffix sorting takes some 17 bytes of memory for each of the base.
_SORT_LIMIT_BYTES = 96 << 20
_MOST_DISTANCES = 12
_SIGN = 1 << 63


class Region(NamedTuple):
    """`length` bytes of the result from `start`, made in the chosen way from `base_start` on."""

    start: int
    length: int
    base_start: int
    choice: Choice


class _Place(NamedTuple):
    """A region before its mode is chosen: the ways there are, the literal one among them."""

    start: int
    length: int
    base_start: int
    ways: list[Choice]

    @property
    def bits(self) -> float:
        """The cheapest way's."""
        return min(self.ways).bits

    @property
    def is_literal(self) -> bool:
        return len(self.ways) == 1 and self.ways[0].mode is Mode.LITERAL


def plans(base: bytes, new: bytes) -> list[list[Region]]:
    """The most promising ways to cover `new` with regions, each in order.

    Each mode has streams of its own, and bytes of one kind that are spread over several streams compress
    worse than the estimate of single blocks says. So plans of few modes compete with those of many.
    """
    places = _places(base, new)
    scored = sorted((_bits(places, modes), i) for i, modes in enumerate(_FAMILIES))
    limit = scored[0][0] * _PROMISING_FACTOR
    distinct: dict[tuple[Mode, ...], list[Region]] = {}
    for bits, i in scored:
        if bits <= limit and len(distinct) < _MOST_PLANS:
            plan = [_region(place, _FAMILIES[i]) for place in places]
            distinct.setdefault(tuple(r.choice.mode for r in plan), plan)
    return list(distinct.values())


# Modes that go together.
_ALWAYS = frozenset({Mode.LITERAL, Mode.COPY})
_FAMILIES = [
    *(_ALWAYS | {mode} for mode in WIDTH),
    *(_ALWAYS | {mode for mode in WIDTH if WIDTH[mode] == width} for width in (1, 2, 4)),
    _ALWAYS | {*WIDTH},
]
_MOST_PLANS = 4
_PROMISING_FACTOR = 1.15


def _bits(places: list[_Place], modes: frozenset[Mode]) -> float:
    return sum(_region(place, modes).choice.bits for place in places)


def _region(place: _Place, modes: frozenset[Mode]) -> Region:
    choice = min(way for way in place.ways if way.mode in modes)
    return Region(place.start, place.length, place.base_start, choice)


def _places(base: bytes, new: bytes) -> list[_Place]:
    a, b = np.frombuffer(base, np.uint8), np.frombuffer(new, np.uint8)
    blocks = [(at, min(_BLOCK_BYTES, len(b) - at)) for at in range(0, len(b), _BLOCK_BYTES)]
    found = [_best(a, b, start, length, (0, len(a) - len(b))) for start, length in blocks]
    left = _with_neighbours(found)
    if not left or not base or len(base) > _SORT_LIMIT_BYTES:
        return found
    matches = list(_matches(base, new, left))
    distances = _frequent(matches)
    again = {p.start: _best(a, b, p.start, p.length, distances) for p in left}
    pieces: dict[int, list[_Place]] = {p.start: [] for p in left}
    for match in matches:
        pieces[match.block].append(_judged(a, b, match))
    return [
        p
        for old in found
        for p in (_cheapest([old], [again[old.start]], pieces[old.start]) if old.start in again else [old])
    ]


def _with_neighbours(found: list[_Place]) -> list[_Place]:
    """Blocks that fit nowhere, and those beside them, in which the change may begin or end."""
    literal = [False, *(p.is_literal for p in found), False]
    return [p for i, p in enumerate(found) if any(literal[i : i + 3])]


def _cheapest(*ways: list[_Place]) -> list[_Place]:
    return min(ways, key=lambda places: sum(p.bits for p in places))


def _best(a: Bytes, b: Bytes, start: int, length: int, distances: Iterable[int]) -> _Place:
    """The block made from the base at the best of some distances, or literally."""
    new = b[start : start + length]
    plain = cost.literal(new)
    best = _Place(start, length, 0, [plain])
    for distance in dict.fromkeys(distances):
        at = start + distance
        if at < 0 or at + length > len(a):
            continue
        ways = cost.aligned(a[at : at + length], new)
        if min(ways).bits < min(best.bits, plain.bits * _MOST_SHARE):
            best = _Place(start, length, at, [*ways, plain])
    return best


class _Match(NamedTuple):
    """Part of a block, and where the suffix sort found its like (None: nowhere)."""

    block: int
    start: int
    length: int
    base_start: int | None


def _matches(base: bytes, new: bytes, left: list[_Place]) -> Iterator[_Match]:
    """Bsdiff's alignment of the blocks that are left, joined to one, cut at the blocks' edges again."""
    joined = b"".join(new[p.start : p.start + p.length] for p in left)
    control, _, _ = bsdiff4.core.diff(base, joined)
    blocks = iter(left)
    block = next(blocks)
    done = 0
    for length, source in _spans(control):
        while length:
            if done == block.length:
                block, done = next(blocks), 0
            part = min(length, block.length - done)
            yield _Match(block.start, block.start + done, part, source)
            done += part
            length -= part
            source = None if source is None else source + part


def _spans(control: bytes) -> Iterator[tuple[int, int | None]]:
    """Bsdiff's triples (similar, extra, seek) as lengths, with their places in the base."""
    position = 0
    for similar, extra, seek in struct.iter_unpack("<3Q", control):
        yield similar, position
        yield extra, None
        # Its integers are a sign bit and a magnitude.
        position += similar + (seek if seek < _SIGN else _SIGN - seek)


def _frequent(matches: Iterable[_Match]) -> list[int]:
    """The distances at which most bytes were found."""
    counts: Counter[int] = Counter()
    for match in matches:
        if match.base_start is not None:
            counts[match.base_start - match.start] += match.length
    return [distance for distance, _ in counts.most_common(_MOST_DISTANCES)]


def _judged(a: Bytes, b: Bytes, match: _Match) -> _Place:
    """A match with its ways."""
    new = b[match.start : match.start + match.length]
    plain = cost.literal(new)
    if match.base_start is not None and match.base_start >= 0:
        old = a[match.base_start : match.base_start + match.length]
        ways = cost.aligned(old, new) if len(old) == len(new) else []
        if ways and min(ways).bits < plain.bits:
            return _Place(match.start, match.length, match.base_start, [*ways, plain])
    return _Place(match.start, match.length, 0, [plain])
