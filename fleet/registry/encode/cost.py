"""Pure: what a block would cost in each mode of a `lanes` patch, estimated, and the cheapest one.

The estimate is the entropy of single bytes, which is about what the streams' compressors reach.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_contract.lanes import Mode

Bytes = npt.NDArray[np.uint8]

# The operation itself, and a gap beyond its information.
_OPERATION_BITS = 40.0
_GAP_BITS = 1.6
# Compressors do worse than the estimate on long runs of zeros with few other bytes, and better on the gaps
# and values of sparse lanes. Measured.
_SPARSE_FACTOR = 0.92
# Sparse blocks are rebuilt lane by lane, so they must be sparse to be fast.
_SPARSEST_SHARE = 1 / 6
_BITS_PER_NAT = 1 / np.log(2)
_DENSE = {1: Mode.DENSE1, 2: Mode.DENSE2, 4: Mode.DENSE4}
_SPARSE = {1: Mode.SPARSE1, 2: Mode.SPARSE2, 4: Mode.SPARSE4}


class Choice(NamedTuple):
    """A mode, the phase of its lanes in the block, and the bits it would cost."""

    bits: float
    mode: Mode
    phase: int = 0


def literal(new: Bytes) -> Choice:
    """The block as it is."""
    return Choice(entropy_bits(new) + _OPERATION_BITS, Mode.LITERAL)


def aligned(old: Bytes, new: Bytes) -> list[Choice]:
    """The ways to make `new` from `old`, of the same length; no mode twice."""
    xor = new ^ old
    if not xor.any():
        return [Choice(_OPERATION_BITS, Mode.COPY)]
    difference = new - old
    found = [Choice(entropy_bits(difference) + _OPERATION_BITS, Mode.DENSE1)]
    found += [_dense(xor, width) for width in (2, 4)]
    if np.count_nonzero(xor) <= len(xor) * _SPARSEST_SHARE:
        found.append(_sparse(difference, 1, 0))
        found += [min(_sparse(xor, width, phase) for phase in range(width)) for width in (2, 4)]
    return found


def entropy_bits(data: Bytes) -> float:
    """Bits of `data` under its own distribution of bytes.

    Corrected for few samples (Miller and Madow 1955); else many short planes would seem to beat few long
    ones.
    """
    counts = np.bincount(data, minlength=1)
    counts = counts[counts > 0]
    plain = -(counts * np.log2(counts / max(len(data), 1))).sum()
    return float(plain + max(len(counts) - 1, 0) / 2 * _BITS_PER_NAT)


def _dense(xor: Bytes, width: int) -> Choice:
    """The place that changes least is the highest of the lane: there floats keep sign and exponent."""
    bits = [entropy_bits(xor[first::width]) for first in range(width)]
    highest = min(range(width), key=lambda first: bits[first])
    return Choice(sum(bits) + _OPERATION_BITS, _DENSE[width], (width - 1 - highest) % width)


def _sparse(change: Bytes, width: int, phase: int) -> Choice:
    lanes = lanes_of(change, width, phase)
    places = lanes.any(axis=1)
    count = int(places.sum())
    gaps = count * (np.log2(len(lanes) / count) + _GAP_BITS)
    values = lanes[places]
    bits = gaps + sum(entropy_bits(values[:, index]) for index in range(width))
    return Choice(float(bits) * _SPARSE_FACTOR + _OPERATION_BITS, _SPARSE[width], phase)


def lanes_of(block: Bytes, width: int, phase: int) -> Bytes:
    """The block in lanes, [count, width]; it begins at place `phase` of the first, zeros around it."""
    tail = -(len(block) + phase) % width
    return np.pad(block, (phase, tail)).reshape(-1, width)
