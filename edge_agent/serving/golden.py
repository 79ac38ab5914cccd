"""Pure: does a model give the golden outputs, within the manifest's tolerance?

Running the model and reading the vectors are done elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edge_agent.serving.tensors import FLOATS, Array
from edge_contract.errors import Reason
from edge_contract.manifest import Tensor, Tolerance


class Finding(NamedTuple):
    """What is wrong, in one sentence with its numbers."""

    reason: Reason
    what: str


class Pair(NamedTuple):
    """One output of one golden sample: what the bundle says, what the model gave."""

    expected: Array
    got: Array


def compare(tensor: Tensor, pairs: Sequence[Pair], tolerance: Tolerance) -> Finding | None:
    """The first way in which an output disagrees with its golden vectors, or None.

    Agreement is |got − expected| ≤ atol + rtol·|expected| for every element, and, where
    `top1_agreement` is not 0, the largest value at the same place in that share of the samples.
    """
    for number, (expected, got) in enumerate(pairs):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return Finding(
                Reason.GOLDEN_MISMATCH,
                f"output {tensor.name!r} of golden sample {number} is {got.dtype} {list(got.shape)}, "
                f"expected {expected.dtype} {list(expected.shape)}",
            )
    if tensor.datatype in FLOATS:
        finding = _non_finite(tensor, pairs)
        if finding is not None:
            return finding
    return _elements(tensor, pairs, tolerance) or _top1(tensor, pairs, tolerance)


def _non_finite(tensor: Tensor, pairs: Sequence[Pair]) -> Finding | None:
    for number, (expected, got) in enumerate(pairs):
        wrong = int(np.count_nonzero(~np.isfinite(got) & np.isfinite(expected)))
        if wrong:
            return Finding(
                Reason.NON_FINITE_OUTPUT,
                f"output {tensor.name!r} of golden sample {number} has NaN or infinity in {wrong} of "
                f"{got.size} values",
            )
    return None


def _elements(tensor: Tensor, pairs: Sequence[Pair], tolerance: Tolerance) -> Finding | None:
    if tensor.datatype == "BYTES":
        return _texts(tensor, pairs)
    expected = np.stack([p.expected for p in pairs]).astype(np.float64)
    got = np.stack([p.got for p in pairs]).astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        # Where the expected value is itself infinite, equal values agree and have no distance.
        distance = np.where(got == expected, 0.0, np.abs(got - expected))
        excess = distance - (tolerance.atol + tolerance.rtol * np.abs(expected))
    # Written so that a NaN, which compares with nothing, counts as wrong unless both sides have it.
    wrong = ~(excess <= 0) & ~(np.isnan(got) & np.isnan(expected))
    if not wrong.any():
        return None
    worst = np.unravel_index(int(np.where(wrong, distance, -1.0).argmax()), distance.shape)
    return Finding(
        Reason.GOLDEN_MISMATCH,
        f"output {tensor.name!r}: {int(wrong.sum())} of {wrong.size} golden values differ, the farthest "
        f"in sample {worst[0]} by {distance[worst]:.4g} (got {got[worst]:.6g}, expected "
        f"{expected[worst]:.6g}; tolerance {tolerance.atol:g} + {tolerance.rtol:g} of the value)",
    )


def _texts(tensor: Tensor, pairs: Sequence[Pair]) -> Finding | None:
    for number, (expected, got) in enumerate(pairs):
        if got.tolist() != expected.tolist():
            return Finding(
                Reason.GOLDEN_MISMATCH,
                f"output {tensor.name!r} of golden sample {number} is another text than expected",
            )
    return None


def _top1(tensor: Tensor, pairs: Sequence[Pair], tolerance: Tolerance) -> Finding | None:
    if not tolerance.top1_agreement or tensor.datatype == "BYTES":
        return None
    same = sum(bool((e.argmax(axis=-1) == g.argmax(axis=-1)).all()) for e, g in pairs if e.ndim)
    share = same / len(pairs)
    if share >= tolerance.top1_agreement:
        return None
    return Finding(
        Reason.GOLDEN_MISMATCH,
        f"output {tensor.name!r}: the largest value is at the same place in {same} of {len(pairs)} golden "
        f"samples ({share:.1%}), {tolerance.top1_agreement:.1%} are needed",
    )
