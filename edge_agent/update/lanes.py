"""Applying a `lanes` patch: streaming, in memory that does not grow with the model, standard library alone.

It runs in the decode child. The format is edge_contract.lanes; digests are checked by the caller.
Arithmetic on lanes is done on whole blocks as large integers, which is as fast as a loop in C.
"""

from __future__ import annotations

import bz2
import lzma
import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple, Protocol

from edge_contract.lanes import (
    BLOCK_BYTES,
    ENTRY_BYTES,
    GAP_ESCAPE,
    GAPS,
    HEADER,
    LITERALS,
    LZMA_DICT_BYTES,
    MAGIC,
    OPERATIONS,
    SPARSE,
    STREAMS,
    WIDTH,
    Codec,
    Mode,
    memory_bytes,
    plane,
    unzigzag,
)

_READ_BYTES = 32 << 10
_LONGEST_NUMBER = 63
_LOW = int.from_bytes(b"\x7f" * BLOCK_BYTES, "little")
_HIGH = int.from_bytes(b"\x80" * BLOCK_BYTES, "little")


class Damaged(Exception):
    """The patch cannot be applied: it is damaged, or of another base."""


class _Decoder(Protocol):
    @property
    def needs_input(self) -> bool: ...
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Raw:
    """No compression, in the shape of the others."""

    eof = False
    needs_input = True

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:  # noqa: ARG002 - it never holds back
        return data


class _Entry(NamedTuple):
    stream: int
    codec: Codec
    size: int
    stored: int


class _Table:
    """The table of streams, read entry by entry."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.used = 0

    def entry(self) -> _Entry:
        stream, codec = self._byte(), self._byte()
        if codec not in list(Codec):
            raise Damaged("a stream has no known codec")
        return _Entry(stream, Codec(codec), _number(self._byte), _number(self._byte))

    def _byte(self) -> int:
        if self.used == len(self._data):
            raise Damaged("its table of streams is cut off")
        self.used += 1
        return self._data[self.used - 1]


class Patch:
    """A patch file, its header read. `memory_bytes` is what applying it takes at most."""

    def __init__(self, handle: int) -> None:
        """`handle` is a descriptor open for reading. Raises Damaged."""
        magic, self.base_bytes, self.result_bytes, count = HEADER.unpack(_exactly(handle, HEADER.size, 0))
        if magic != MAGIC:
            raise Damaged("it does not begin as a patch does")
        table = _Table(os.pread(handle, count * ENTRY_BYTES, HEADER.size))
        entries = [table.entry() for _ in range(count)]
        self._streams: dict[int, _Stream] = {}
        at = HEADER.size + table.used
        for entry in entries:
            if entry.stream not in STREAMS or entry.stream in self._streams:
                raise Damaged("its table of streams makes no sense")
            self._streams[entry.stream] = _Stream(handle, at, entry)
            at += entry.stored
        if at != os.fstat(handle).st_size:
            raise Damaged("it is cut off, or longer than it says")
        self.memory_bytes = memory_bytes(entry.codec for entry in entries)
        self._empty = _Stream(handle, at, _Entry(0, Codec.RAW, 0, 0))

    def apply(self, base: int) -> Iterator[bytes]:
        """The result in pieces; `base` is a descriptor open for reading. Raises Damaged."""
        if os.fstat(base).st_size != self.base_bytes:
            raise Damaged("it applies to another base")
        made = expected = 0
        while made < self.result_bytes:
            first = self._stream(OPERATIONS).read(1)[0]
            mode, phase = Mode(first & 7), first >> 3
            length = self._number()
            if not 0 < length <= self.result_bytes - made:
                raise Damaged("an operation makes more than the result")
            if mode is Mode.LITERAL:
                yield from self._literal(length)
            else:
                offset = expected + unzigzag(self._number())
                expected = offset + length
                if offset < 0 or expected > self.base_bytes:
                    raise Damaged("an operation reads outside the base")
                yield from self._aligned(mode, phase, base, offset, length)
            made += length

    def _literal(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self._stream(LITERALS).read(min(length, BLOCK_BYTES))
            yield piece
            length -= len(piece)

    def _aligned(self, mode: Mode, phase: int, base: int, offset: int, length: int) -> Iterator[bytes]:
        if mode is Mode.COPY:
            for at in range(offset, offset + length, BLOCK_BYTES):
                yield _exactly(base, min(BLOCK_BYTES, offset + length - at), at)
            return
        if length > BLOCK_BYTES or phase >= WIDTH[mode]:
            raise Damaged("an operation is out of bounds")
        old = _exactly(base, length, offset)
        change = self._sparse(mode, phase, length) if mode in SPARSE else self._dense(mode, phase, length)
        yield _add(old, change) if WIDTH[mode] == 1 else _xor(old, change)

    def _dense(self, mode: Mode, phase: int, length: int) -> bytes:
        """Planes woven into lanes; byte i of the block lies at place (i + phase) mod width of its lane."""
        width = WIDTH[mode]
        if width == 1:
            return self._stream(plane(mode, 0)).read(length)
        out = bytearray(length)
        for first in range(min(width, length)):
            count = len(range(first, length, width))
            out[first::width] = self._stream(plane(mode, (first + phase) % width)).read(count)
        return bytes(out)

    def _sparse(self, mode: Mode, phase: int, length: int) -> bytes:
        """Zeros but for some lanes; the first lane begins `phase` bytes before the block."""
        width = WIDTH[mode]
        lanes = -(-(length + phase) // width)
        count, gap_bytes = self._number(), self._number()
        if count > lanes or gap_bytes > count + lanes // GAP_ESCAPE + 1:
            raise Damaged("an operation changes more than its block")
        places = _places(self._stream(GAPS).read(gap_bytes), count, lanes)
        out = bytearray(lanes * width)
        for index in range(width):
            for place, value in zip(places, self._stream(plane(mode, index)).read(count), strict=True):
                out[place * width + index] = value
        return bytes(out[phase : phase + length])

    def _stream(self, stream: int) -> _Stream:
        return self._streams.get(stream, self._empty)

    def _number(self) -> int:
        operations = self._stream(OPERATIONS)
        return _number(lambda: operations.read(1)[0])


class _Stream:
    """One stream, read from its place in the file as it is needed."""

    def __init__(self, handle: int, at: int, entry: _Entry) -> None:
        self._handle = handle
        self._at = at
        self._entry = entry
        self._left = entry.stored
        self._budget = entry.size
        self._decoder: _Decoder | None = None
        self._ready = b""
        self._used = 0

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes. Raises Damaged when the stream has less."""
        end = self._used + count
        if end <= len(self._ready):
            piece = self._ready[self._used : end]
            self._used = end
            return piece
        parts = [self._ready[self._used :]]
        missing = count - len(parts[0])
        while missing > 0:
            self._ready = self._more()
            self._used = min(missing, len(self._ready))
            parts.append(self._ready[: self._used])
            missing -= self._used
        return b"".join(parts)

    def _more(self) -> bytes:
        """The next piece of the stream, not empty."""
        if self._decoder is None:
            self._decoder = _open(self._entry.codec)
        while True:
            stored = b""
            if self._decoder.needs_input:
                stored = _exactly(self._handle, min(self._left, _READ_BYTES), self._at)
                if not stored:
                    raise Damaged("a stream ends too early")
                self._at += len(stored)
                self._left -= len(stored)
            try:
                piece = self._decoder.decompress(stored, _READ_BYTES)
            except (OSError, EOFError, ValueError, lzma.LZMAError) as e:
                raise Damaged(f"a stream cannot be decompressed: {e}") from e
            if piece:
                self._budget -= len(piece)
                if self._budget < 0:
                    raise Damaged("a stream is longer than it says")
                return piece
            if self._decoder.eof:
                raise Damaged("a stream ends too early")


def _open(codec: Codec) -> _Decoder:
    if codec is Codec.BZ2:
        return bz2.BZ2Decompressor()
    if codec is Codec.LZMA:
        # The dictionary's size is not the patch's to say.
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": LZMA_DICT_BYTES}]
        return lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters)
    return _Raw()


def _exactly(handle: int, count: int, at: int) -> bytes:
    data = os.pread(handle, count, at)
    while len(data) < count:
        more = os.pread(handle, count - len(data), at + len(data))
        if not more:
            raise Damaged("it is cut off")
        data += more
    return data


def _number(byte: Callable[[], int]) -> int:
    value = 0
    for shift in range(0, _LONGEST_NUMBER, 7):
        digit = byte()
        value |= (digit & 0x7F) << shift
        if digit < 0x80:
            return value
    raise Damaged("a number is too long")


def _places(gaps: bytes, count: int, lanes: int) -> list[int]:
    """Lane numbers from the distances between them."""
    distances: list[int] = []
    carried = 1
    for gap in gaps:
        carried += gap
        if gap != GAP_ESCAPE:
            distances.append(carried)
            carried = 1
    places = [place - 1 for place in accumulate(distances)]
    if len(places) != count or carried != 1 or (places and places[-1] >= lanes):
        raise Damaged("the lanes that change lie outside their block")
    return places


def _add(old: bytes, change: bytes) -> bytes:
    """Bytewise sum modulo 256: low seven bits add without reaching the neighbour, the top bit is an xor."""
    a, b = int.from_bytes(old, "little"), int.from_bytes(change, "little")
    return ((a & _LOW) + (b & _LOW) ^ (a ^ b) & _HIGH).to_bytes(len(old), "little")


def _xor(old: bytes, change: bytes) -> bytes:
    return (int.from_bytes(old, "little") ^ int.from_bytes(change, "little")).to_bytes(len(old), "little")
