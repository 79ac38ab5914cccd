"""Choosing among encodings, and the alignment that patches are made from."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from edge_contract.encodings import LANES, ZSTD, ZSTD_PATCH
from edge_contract.lanes import Mode
from fleet.registry.encode import align, candidates, cost, zstd
from fleet.registry.encode.candidates import Candidate, worthwhile_patches, worthwhile_whole

RNG = np.random.default_rng(4)


def patch(algorithm: str, size: int, memory: int) -> Candidate:
    return Candidate(algorithm, bytes(size), memory)


@pytest.mark.parametrize(
    ("lanes", "prefix", "kept"),
    [
        (699, 999, [LANES]),
        (700, 999, []),
        (999, 699, [ZSTD_PATCH]),
        (500, 480, [LANES]),  # not short enough for the memory it takes
        (500, 470, [LANES, ZSTD_PATCH]),
        (500, 500, [LANES]),
    ],
)
def test_useful_patches(lanes: int, prefix: int, kept: list[str]) -> None:
    found = [patch(ZSTD_PATCH, prefix, 500), patch(LANES, lanes, 10)]
    assert [c.algorithm for c in worthwhile_patches(found, 1000)] == kept


def test_a_compressed_blob_must_save_something() -> None:
    assert worthwhile_whole(patch(ZSTD, 979, 0), 1000)
    assert not worthwhile_whole(patch(ZSTD, 980, 0), 1000)


def test_zstandard_refuses_bases_that_its_window_does_not_reach() -> None:
    assert zstd.patch(b"", b"new") is None
    assert zstd.patch(b"1234567", b"new") is None
    assert zstd.patch(bytes(100 << 20), bytes(40 << 20)) is None


def test_the_memory_that_is_named_grows_with_base_and_result_for_zstandard_alone() -> None:
    small, large = (RNG.bytes(n) for n in (20_000, 60_000))
    needs = [{c.algorithm: c.memory_bytes for c in candidates.patches(b, b[::-1])} for b in (small, large)]
    assert needs[1][ZSTD_PATCH] - needs[0][ZSTD_PATCH] == 2 * 40_000
    assert max(n[LANES] for n in needs) < 50 << 20


# --- alignment ---


def modes(base: bytes, new: bytes) -> list[tuple[str, int]]:
    """Mode and distance of each region of the first plan."""
    return [(r.choice.mode.name, r.base_start - r.start) for r in align.plans(base, new)[0]]


def test_a_plan_covers_the_result_in_order() -> None:
    base, new = RNG.bytes(30_000), RNG.bytes(50_001)
    for plan in align.plans(base, new):
        at = 0
        for region in plan:
            assert region.start == at
            at += region.length
        assert at == len(new)


def test_what_stayed_is_copied_and_what_is_behind_an_insertion_found() -> None:
    base = RNG.bytes(1 << 16)
    new = base[:20_000] + b"inserted" + base[20_000:]
    found = modes(base, new)
    assert ("COPY", 0) in found
    assert ("COPY", -8) in found
    assert sum(mode != "COPY" for mode, _ in found) <= 2


def test_a_distance_that_no_end_of_the_file_shows_is_found_by_matches() -> None:
    """Two insertions: between them neither the offset nor the end fits. All floats moved a little."""
    old = RNG.normal(0, 1, 60_000).astype(np.float32)
    moved = old + RNG.normal(0, 0.001, len(old)).astype(np.float32)
    names = [b"layer-%d-weights-of-a-convolution" % i for i in range(3)]
    base = b"".join(n + old[i * 20_000 : (i + 1) * 20_000].tobytes() for i, n in enumerate(names))
    new = b"".join(
        n + bytes(100) + moved[i * 20_000 : (i + 1) * 20_000].tobytes() for i, n in enumerate(names)
    )
    found = modes(base, new)
    literal = sum(mode == "LITERAL" for mode, _ in found)
    assert {distance for mode, distance in found if mode == "DENSE4"} >= {-100, -200, -300}
    assert literal < 0.2 * len(found)


def test_bsdiffs_integers_have_a_sign_bit() -> None:
    control = struct.pack("<3Q", 10, 2, (1 << 63) | 4) + struct.pack("<3Q", 3, 0, 0)
    assert list(align._spans(control)) == [(10, 0), (2, None), (3, 6), (0, None)]


# --- modes ---


def best(old: np.ndarray, new: np.ndarray) -> Mode:
    a, b = (np.frombuffer(x.tobytes(), np.uint8) for x in (old, new))
    return min([*cost.aligned(a, b), cost.literal(b)]).mode


def test_each_kind_of_change_has_its_mode() -> None:
    floats = RNG.normal(0, 1, 1000).astype(np.float32)
    halves = RNG.normal(0, 1, 2048).astype(np.float16)
    steps = RNG.integers(-100, 100, 4000).astype(np.int8)
    few = RNG.random(1000) < 0.01
    assert best(floats, floats) is Mode.COPY
    assert best(floats, floats * np.float32(1.0005)) is Mode.DENSE4
    assert best(floats, np.where(few, floats * 1.3, floats).astype(np.float32)) is Mode.SPARSE4
    assert best(halves, (halves + RNG.normal(0, 0.05, 2048)).astype(np.float16)) in (Mode.DENSE2, Mode.DENSE4)
    assert best(steps, (steps + RNG.integers(-1, 2, 4000)).astype(np.int8)) is Mode.DENSE1
    assert best(steps, (steps + (RNG.random(4000) < 0.02)).astype(np.int8)) is Mode.SPARSE1
    assert best(steps, RNG.integers(-100, 100, 4000).astype(np.int8)) is Mode.LITERAL
