"""Writing `lanes` patches. The format is edge_contract.lanes, the choice of regions align.py's."""

from __future__ import annotations

import bz2
import lzma
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from edge_contract.lanes import (
    BLOCK_BYTES,
    GAP_ESCAPE,
    GAPS,
    HEADER,
    LITERALS,
    LZMA_DICT_BYTES,
    MAGIC,
    OPERATIONS,
    SPARSE,
    WIDTH,
    Codec,
    Mode,
    memory_bytes,
    number,
    plane,
    zigzag,
)
from fleet.registry.encode import align
from fleet.registry.encode.align import Region
from fleet.registry.encode.cost import Bytes, lanes_of

# Compression that saves less costs the device time for nothing.
_WORTH_SHARE = 0.99
_SAMPLE_BYTES = 256 << 10


class Patch(NamedTuple):
    """The file, and what applying it takes."""

    data: bytes
    memory_bytes: int


def patch(base: bytes, new: bytes) -> Patch:
    """The smallest patch found that makes `new` from `base`."""
    return min((_written(base, new, plan) for plan in align.plans(base, new)), key=lambda p: len(p.data))


def _written(base: bytes, new: bytes, plan: list[Region]) -> Patch:
    writer = _Writer(base, new)
    for region in _merged(plan):
        writer.add(region)
    return writer.finish()


def _merged(regions: Iterable[Region]) -> Iterator[Region]:
    """Neighbours that continue each other as one, up to the size of a block."""
    held: Region | None = None
    for region in regions:
        if held is not None and _continues(held, region):
            held = held._replace(length=held.length + region.length)
            continue
        if held is not None:
            yield held
        held = region
    if held is not None:
        yield held


def _continues(a: Region, b: Region) -> bool:
    mode = a.choice.mode
    if mode is not b.choice.mode:
        return False
    if mode is Mode.LITERAL:
        return True
    if b.base_start != a.base_start + a.length:
        return False
    if mode is Mode.COPY:
        return True
    same_phase = (a.choice.phase + a.length - b.choice.phase) % WIDTH[mode] == 0
    return same_phase and a.length + b.length <= BLOCK_BYTES


class _Writer:
    def __init__(self, base: bytes, new: bytes) -> None:
        self._sizes = (len(base), len(new))
        self._base, self._new = np.frombuffer(base, np.uint8), np.frombuffer(new, np.uint8)
        self._streams: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._expected = 0

    def add(self, region: Region) -> None:
        """One operation and what it consumes."""
        mode, phase = region.choice.mode, region.choice.phase
        new = self._new[region.start : region.start + region.length]
        operations = self._streams[OPERATIONS]
        operations += bytes([mode | phase << 3]) + number(region.length)
        if mode is Mode.LITERAL:
            self._streams[LITERALS] += new.tobytes()
            return
        operations += number(zigzag(region.base_start - self._expected))
        self._expected = region.base_start + region.length
        if mode is Mode.COPY:
            return
        old = self._base[region.base_start : self._expected]
        change = new - old if WIDTH[mode] == 1 else new ^ old
        if mode in SPARSE:
            self._sparse(mode, phase, change)
        else:
            self._dense(mode, phase, change)

    def _dense(self, mode: Mode, phase: int, change: Bytes) -> None:
        width = WIDTH[mode]
        for first in range(width):
            self._streams[plane(mode, (first + phase) % width)] += change[first::width].tobytes()

    def _sparse(self, mode: Mode, phase: int, change: Bytes) -> None:
        lanes = lanes_of(change, WIDTH[mode], phase)
        places = np.flatnonzero(lanes.any(axis=1))
        gaps = _gaps(places)
        self._streams[OPERATIONS] += number(len(places)) + number(len(gaps))
        self._streams[GAPS] += gaps
        for index in range(WIDTH[mode]):
            self._streams[plane(mode, index)] += lanes[places, index].tobytes()

    def finish(self) -> Patch:
        """Compress the streams and put the file together."""
        table, stored, codecs = b"", b"", []
        for stream, data in sorted(self._streams.items()):
            codec, packed = _packed(bytes(data))
            table += bytes([stream, codec]) + number(len(data)) + number(len(packed))
            stored += packed
            codecs.append(codec)
        header = HEADER.pack(MAGIC, *self._sizes, len(codecs))
        return Patch(header + table + stored, memory_bytes(codecs))


def _gaps(places: np.ndarray[tuple[int, ...], np.dtype[np.intp]]) -> bytes:
    """Lanes that are passed over before each place."""
    out = bytearray()
    for gap in (np.diff(places, prepend=-1) - 1).tolist():
        out += b"\xff" * (gap // GAP_ESCAPE)
        out.append(gap % GAP_ESCAPE)
    return bytes(out)


def _packed(data: bytes) -> tuple[Codec, bytes]:
    """The smallest form of one stream. Which compressor wins differs from stream to stream.

    A long stream is judged by a part of it: compressing it in every way would take most of the time.
    """
    part = data if len(data) <= 2 * _SAMPLE_BYTES else data[len(data) // 2 :][:_SAMPLE_BYTES]
    ways: list[tuple[Codec, Callable[[bytes], bytes]]] = [
        (Codec.BZ2, bz2.compress),
        (Codec.LZMA, partial(_lzma, literal_context_bits=0)),
        (Codec.LZMA, partial(_lzma, literal_context_bits=3)),
    ]
    codec, way = min(ways, key=lambda pair: len(pair[1](part)))
    packed = way(data)
    return (codec, packed) if len(packed) < len(data) * _WORTH_SHARE else (Codec.RAW, data)


def _lzma(data: bytes, literal_context_bits: int) -> bytes:
    """Without context (0) random-looking bytes cost least, with it (3) text does."""
    options = {"dict_size": LZMA_DICT_BYTES, "lc": literal_context_bits, "lp": 0, "pb": 0}
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, **options}]
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)
