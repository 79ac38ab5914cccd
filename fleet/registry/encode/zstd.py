"""Zstandard, whole and with a base as its prefix (`zstd --patch-from`). Only this file imports it here."""

from __future__ import annotations

import sys
from typing import NamedTuple

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, Strategy, ZstdDict, compress
else:
    from backports.zstd import CompressionParameter, Strategy, ZstdDict, compress

_LEVEL = 19
# What level 19 uses by itself; a decoder needs a window of this size and not more.
_WHOLE_WINDOW_LOG = 23
_LEAST_WINDOW_LOG, _MOST_WINDOW_LOG = 10, 27
_BUFFERS_BYTES = 2 << 20
_LEAST_BASE_BYTES = 8


class Frame(NamedTuple):
    """A Zstandard frame, and what decoding it takes."""

    data: bytes
    memory_bytes: int


def whole(new: bytes) -> Frame:
    """`new`, compressed."""
    log = _window_log(len(new), _WHOLE_WINDOW_LOG)
    options: dict[int, int] = {
        CompressionParameter.compression_level: _LEVEL,
        CompressionParameter.window_log: log,
    }
    return Frame(compress(new, options=options), min(1 << log, len(new)) + _BUFFERS_BYTES)


def patch(base: bytes, new: bytes) -> Frame | None:
    """`new`, compressed with `base` before it; None for a base that Zstandard takes none of, or too much.

    A decoder holds the base and the result, which is smaller than the window. Lower levels miss most
    matches in the base.
    """
    log = _window_log(len(base) + len(new), _MOST_WINDOW_LOG)
    if len(base) < _LEAST_BASE_BYTES or 1 << log < len(base) + len(new):
        return None
    options: dict[int, int] = {
        CompressionParameter.compression_level: _LEVEL,
        CompressionParameter.window_log: log,
        CompressionParameter.enable_long_distance_matching: 1,
        CompressionParameter.strategy: Strategy.btultra2,
    }
    data = compress(new, options=options, zstd_dict=ZstdDict(base, is_raw=True).as_prefix)
    return Frame(data, len(base) + len(new) + _BUFFERS_BYTES)


def _window_log(size_bytes: int, most: int) -> int:
    return min(max(size_bytes.bit_length(), _LEAST_WINDOW_LOG), most)
