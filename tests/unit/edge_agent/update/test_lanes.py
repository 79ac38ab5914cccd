"""Patches made by the registry's code and applied by the device's: whole, damaged, malicious."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.update.lanes import Damaged, Patch
from edge_contract.lanes import (
    BLOCK_BYTES,
    GAPS,
    HEADER,
    LITERALS,
    MAGIC,
    OPERATIONS,
    Codec,
    Mode,
    number,
    plane,
    unzigzag,
    zigzag,
)
from fleet.registry.encode import lanes
from tests.support import weights

RNG = np.random.default_rng(3)


def apply(base: bytes, patch: bytes) -> bytes:
    with memory_file(base) as old, memory_file(patch) as new:
        return b"".join(Patch(new).apply(old))


class memory_file:
    """A descriptor of a file that is nowhere on disk."""

    def __init__(self, data: bytes) -> None:
        self._handle = os.memfd_create("test")
        os.write(self._handle, data)

    def __enter__(self) -> int:
        return self._handle

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


@pytest.mark.parametrize("case", weights.cases(weights.layers(weights.SMALL)), ids=lambda case: case.name)
def test_a_changed_model_is_made_again_from_much_less(case: weights.Case) -> None:
    patch = lanes.patch(case.base, case.new)
    assert apply(case.base, patch.data) == case.new
    assert len(patch.data) < 0.7 * len(case.new)
    assert patch.memory_bytes < 64 << 20


def test_weights_behind_an_inserted_layer_are_found_again() -> None:
    """All of them moved, so that no long run of bytes is equal, and half of them lie elsewhere."""
    before = weights.layers((16, 32, 48, 48))
    extra = np.zeros((48, 48, 1, 1), np.float32) + 0.5
    after = [*before[:2], *weights.layers((48,), seed=9), *before[2:]]
    after[2] = extra
    base, new = weights.fp32(before), weights.fp32(weights.all_weights(after))
    patch = lanes.patch(base, new)
    assert apply(base, patch.data) == new
    assert len(patch.data) < 0.7 * len(new)


def words(count: int) -> bytes:
    return RNG.integers(0, 4, count, np.uint8).tobytes()


@pytest.mark.parametrize(
    ("base", "new"),
    [
        (b"", b""),
        (b"", b"new"),
        (b"old", b""),
        (b"same", b"same"),
        (words(10), words(300_000)),
        (words(300_000), words(10)),
        (words(100_000), words(100_000)),
        (bytes(200_000), bytes(199_999) + b"\x01"),
        (bytes(70_000), b"\x01" + bytes(69_998) + b"\xff"),
    ],
)
def test_anything_can_be_made_from_anything(base: bytes, new: bytes) -> None:
    assert apply(base, lanes.patch(base, new).data) == new


@st.composite
def edited(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Some bytes, and the same after cuts, insertions and changes of single bytes and words."""
    base = draw(st.binary(max_size=40)) * draw(st.integers(1, 400))
    new = bytearray(base)
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(new)))
        match draw(st.integers(0, 2)):
            case 0:
                new[at:at] = draw(st.binary(max_size=30))
            case 1:
                del new[at : at + draw(st.integers(0, 30))]
            case _:
                for place in range(at, len(new), draw(st.integers(3, 50))):
                    new[place] = (new[place] + 1) % 256
    return base, bytes(new)


@given(edited())
def test_edits_come_back(pair: tuple[bytes, bytes]) -> None:
    base, new = pair
    assert apply(base, lanes.patch(base, new).data) == new


@given(st.integers(-(1 << 40), 1 << 40))
def test_zigzag_comes_back(value: int) -> None:
    assert zigzag(value) >= 0
    assert unzigzag(zigzag(value)) == value


# --- damage ---

CASE = weights.cases(weights.layers(weights.SMALL))[1]


@pytest.fixture(scope="module")
def patch() -> bytes:
    return lanes.patch(CASE.base, CASE.new).data


def damaged(patch: bytes) -> Iterator[bytes]:
    for at in range(0, len(patch), max(1, len(patch) // 150)):
        yield patch[:at]
        yield patch[:at] + bytes([patch[at] ^ 1 << at % 8]) + patch[at + 1 :]
        yield patch[:at] + bytes(len(patch) - at)
    yield patch + b"\0"


def test_damage_is_noticed_or_harmless(patch: bytes) -> None:
    """No other exception, and no result beyond its size; a wrong one is for the digest to find."""
    noticed = 0
    for data in damaged(patch):
        try:
            assert len(apply(CASE.base, data)) <= len(CASE.new) + BLOCK_BYTES or data[16:24] != patch[16:24]
        except Damaged:
            noticed += 1
    assert noticed > 100


def test_another_base_is_refused_by_its_length(patch: bytes) -> None:
    with pytest.raises(Damaged, match="another base"):
        apply(CASE.base + b"x", patch)


def made(operations: bytes, result: int, base: int = 4, **streams: bytes) -> bytes:
    """A patch with these operations; `streams` are named literals, gaps, or p5_0 for a plane."""
    parts = {OPERATIONS: operations}
    for name, data in streams.items():
        known = {"literals": LITERALS, "gaps": GAPS}
        mode, _, index = name[1:].partition("_")
        parts[known[name] if name in known else plane(Mode(int(mode)), int(index))] = data
    table = b"".join(entry(s, Codec.RAW, len(d), len(d)) for s, d in parts.items())
    return HEADER.pack(MAGIC, base, result, len(parts)) + table + b"".join(parts.values())


def entry(stream: int, codec: int, size: int, stored: int) -> bytes:
    return bytes([stream, codec]) + number(size) + number(stored)


def op(mode: int, length: int, *more: int, phase: int = 0) -> bytes:
    return bytes([mode | phase << 3, *number(length)]) + b"".join(number(n) for n in more)


def test_the_format_by_hand() -> None:
    """Byte for byte, so that a change of it is noticed."""
    operations = op(Mode.LITERAL, 2) + op(Mode.COPY, 2, zigzag(1)) + op(Mode.SPARSE1, 3, zigzag(-3), 1, 1)
    operations += op(Mode.DENSE4, 4, zigzag(-3), phase=1)
    planes = {"p4_0": b"\x08", "p4_1": b"\x01", "p4_2": b"\x02", "p4_3": b"\x04"}
    patch = made(operations, 11, literals=b"hi", gaps=b"\x02", p5_0=b"\xff", **planes)
    # COPY: base[1:3]; SPARSE1: base[0:3], place 2 less 1; DENSE4: base[0:4] ^ 01 02 04 08
    expected = b"hi" + b"\x20\x30" + b"\x10\x20\x2f" + b"\x11\x22\x34\x48"
    assert apply(b"\x10\x20\x30\x40", patch) == expected


@pytest.mark.parametrize(
    "patch",
    [
        made(b"", 1),
        made(op(Mode.LITERAL, 0), 1),
        made(op(Mode.LITERAL, 5), 5, literals=b"1234"),
        made(op(Mode.LITERAL, 5), 4, literals=b"12345"),
        made(op(Mode.COPY, 4, zigzag(1)), 4),
        made(op(Mode.COPY, 4, zigzag(-1)), 4),
        made(op(Mode.COPY, 1 << 40, zigzag(0)), 1 << 40),
        made(op(Mode.DENSE1, 4, 0, phase=1), 4, p2_0=b"1234"),
        made(op(Mode.DENSE4, 4, 0, phase=5), 4),
        made(op(Mode.SPARSE1, 4, 0, 5, 5), 4, gaps=bytes(5), p5_0=bytes(5)),
        made(op(Mode.SPARSE1, 4, 0, 1, 200), 4, gaps=bytes(200), p5_0=b"1"),
        made(op(Mode.SPARSE1, 4, 0, 1, 1), 4, gaps=b"\x04", p5_0=b"1"),
        made(op(Mode.SPARSE1, 4, 0, 1, 1), 4, gaps=b"\xff", p5_0=b"1"),
        made(op(Mode.SPARSE1, 4, 0, 2, 1), 4, gaps=b"\x01", p5_0=b"12"),
        made(op(Mode.SPARSE1, 4, 0, 2, 2), 4, gaps=b"\x01\x01", p5_0=b"1"),
        made(op(Mode.DENSE1, BLOCK_BYTES + 1, 0), BLOCK_BYTES + 1, base=4),
        made(b"\x01" + b"\xff" * 20, 4),
        HEADER.pack(MAGIC, 4, 4, 200) + bytes(100),
        HEADER.pack(MAGIC, 4, 4, 1) + b"\0\0" + b"\xff" * 20,
        b"",
        b"EWLANES2" + bytes(40),
        HEADER.pack(MAGIC, 4, 4, 1) + entry(99, 0, 0, 0),
        HEADER.pack(MAGIC, 4, 4, 1) + entry(0, 9, 0, 0),
        HEADER.pack(MAGIC, 4, 4, 2) + entry(0, 0, 0, 0) * 2,
        HEADER.pack(MAGIC, 4, 4, 1) + entry(0, 0, 4, 1 << 60),
        HEADER.pack(MAGIC, 4, 9, 1) + entry(0, 0, 1, 6) + op(Mode.COPY, 1, 0) * 2,
    ],
)
def test_what_cannot_be_right_is_refused(patch: bytes) -> None:
    with pytest.raises(Damaged):
        apply(b"1234", patch)
