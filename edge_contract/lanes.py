"""Pure: the file format of `lanes` patches, for the program that makes them and the one that applies them.

A patch says how to build a result from aligned regions of a base: a list of operations, and the bytes
that they consume in streams of their own, so that like is compressed with like. Numbers are little
endian; docs/deltas.md describes the format in words.

    header   MAGIC, base size u64, result size u64, number of streams u8
    table    per stream: id u8, codec u8, size, stored size
    streams  in the order of the table

Other numbers have 7 bits a byte, lowest first. An operation is a byte `mode | phase << 3`, the length of
what it makes, for all but LITERAL the base offset less the one expected (zigzag), and for sparse modes
the count of differing lanes and the count of bytes in GAPS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum

MAGIC = b"EWLANES1"
HEADER = struct.Struct("<8sQQB")
# Longest result of one dense or sparse operation: what a reader must hold at a time.
BLOCK_BYTES = 1 << 16
# Longest entry of the table.
ENTRY_BYTES = 2 + 2 * 10
# Dictionary of the LZMA streams, which bounds the memory of their decoder.
LZMA_DICT_BYTES = 1 << 20
# A gap of this many lanes and more continues in the next byte.
GAP_ESCAPE = 255


class Mode(IntEnum):
    """How an operation makes its bytes. The number is the width of a lane in bytes.

    One-byte lanes are differences modulo 256, as integers move by small steps. Wider ones are exclusive
    ors, whose high bytes are zero where floats keep sign, exponent and leading bits.
    """

    LITERAL = 0
    COPY = 1
    DENSE1 = 2
    DENSE2 = 3
    DENSE4 = 4
    SPARSE1 = 5
    SPARSE2 = 6
    SPARSE4 = 7


class Codec(IntEnum):
    """Compression of one stream; all of Python's standard library. LZMA is a bare LZMA2 stream."""

    RAW = 0
    BZ2 = 1
    LZMA = 2


WIDTH = {
    Mode.DENSE1: 1,
    Mode.DENSE2: 2,
    Mode.DENSE4: 4,
    Mode.SPARSE1: 1,
    Mode.SPARSE2: 2,
    Mode.SPARSE4: 4,
}
SPARSE = frozenset({Mode.SPARSE1, Mode.SPARSE2, Mode.SPARSE4})

OPERATIONS, LITERALS, GAPS = 0, 1, 2
_PLANES = 8

# What the decoder of a stream holds: bzip2's largest block, LZMA's dictionary and tables.
_CODEC_BYTES = {Codec.RAW: 0, Codec.BZ2: 5 << 20, Codec.LZMA: 2 << 20}
# Buffers of all streams, blocks and the hash.
_FIXED_BYTES = 4 << 20


def plane(mode: Mode, index: int) -> int:
    """The stream of the bytes at place `index` in the lanes of `mode`."""
    return _PLANES + 4 * (mode - Mode.DENSE1) + index


STREAMS = frozenset(
    {OPERATIONS, LITERALS, GAPS} | {plane(m, i) for m, width in WIDTH.items() for i in range(width)}
)


def memory_bytes(codecs: Iterable[Codec]) -> int:
    """What a reader allocates at most, whatever the size of the blob."""
    return _FIXED_BYTES + sum(_CODEC_BYTES[codec] for codec in codecs)


def number(value: int) -> bytes:
    """A non-negative integer, 7 bits a byte, lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> int:
    """Signed to non-negative, small to small."""
    return value << 1 if value >= 0 else (-value << 1) - 1


def unzigzag(value: int) -> int:
    """The inverse."""
    return -((value + 1) >> 1) if value & 1 else value >> 1
