"""Which encoding a device takes."""

from __future__ import annotations

import pytest

from edge_agent.update.encodings import after_failure, ranked
from edge_contract.encodings import LANES, ZSTD, ZSTD_PATCH, Encoding

BASE, OTHER = "b" * 64, "d" * 64
ALL = frozenset({LANES, ZSTD, ZSTD_PATCH})


def offer(algorithm: str, size: int, memory: int = 10, base: str | None = BASE) -> Encoding:
    return Encoding(algorithm, f"{size:064d}", size, memory, None if algorithm == ZSTD else base)


OFFERS = [offer(ZSTD, 90), offer(LANES, 30), offer(ZSTD_PATCH, 20, memory=500), offer(LANES, 10, base=OTHER)]


@pytest.mark.parametrize(
    ("bases", "reads", "memory", "sizes"),
    [
        ({BASE, OTHER}, ALL, 500, [10, 20, 30, 90]),
        ({BASE}, ALL, 500, [20, 30, 90]),
        ({BASE}, ALL, 499, [30, 90]),
        ({BASE}, {LANES}, 500, [30]),
        (set(), ALL, 500, [90]),
        ({BASE, OTHER}, set(), 500, []),
        ({BASE, OTHER}, ALL, 9, []),
    ],
)
def test_the_shortest_that_this_device_can_use_comes_first(
    bases: set[str], reads: set[str], memory: int, sizes: list[int]
) -> None:
    found = ranked(100, OFFERS, bases=bases, reads=reads, memory_bytes=memory)
    assert [e.size_bytes for e in found] == sizes


def test_what_is_not_shorter_than_the_blob_is_no_help() -> None:
    assert ranked(30, OFFERS, bases={BASE}, reads={LANES}, memory_bytes=500) == []


def test_after_a_failure_no_patch_is_tried() -> None:
    assert [e.algorithm for e in after_failure(OFFERS)] == [ZSTD]
