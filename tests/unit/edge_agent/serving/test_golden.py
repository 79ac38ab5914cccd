"""When a model agrees with its golden vectors, and what is said when it does not."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.serving.golden import Pair, compare
from edge_contract.errors import Reason
from edge_contract.manifest import Tensor, Tolerance

Y = Tensor("y", "FP32", [-1, 3])
EXPECTED = np.array([[0.1, 0.7, 0.2]], np.float32)


def pair(*got: float) -> Pair:
    return Pair(EXPECTED, np.array([got], np.float32))


def test_equal_outputs_agree() -> None:
    assert compare(Y, [pair(0.1, 0.7, 0.2)], Tolerance(0, 0, 1.0)) is None


@pytest.mark.parametrize(
    ("atol", "rtol", "agrees"), [(0.02, 0, True), (0.005, 0, False), (0, 0.02, True), (0, 0.01, False)]
)
def test_the_tolerance_is_atol_plus_rtol_of_the_expected_value(
    atol: float, rtol: float, agrees: bool
) -> None:
    found = compare(Y, [pair(0.1, 0.71, 0.2)], Tolerance(atol, rtol))
    assert (found is None) is agrees


def test_a_mismatch_says_which_output_where_how_far_and_the_tolerance() -> None:
    found = compare(Y, [pair(0.1, 0.7, 0.2), pair(0.1, 0.7, 0.9)], Tolerance(0.01, 0.001))
    assert found is not None
    assert found.reason is Reason.GOLDEN_MISMATCH
    for part in ("'y'", "1 of 6", "sample 1", "by 0.7", "got 0.9", "expected 0.2", "0.01 + 0.001"):
        assert part in found.what


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_a_reason_of_its_own(value: float) -> None:
    found = compare(Y, [pair(0.1, value, 0.2)], Tolerance(1e9, 1e9))
    assert found is not None
    assert found.reason is Reason.NON_FINITE_OUTPUT
    assert "1 of 3" in found.what


def test_infinity_where_it_is_expected() -> None:
    array = np.array([[np.inf, -np.inf, np.nan]], np.float32)
    assert compare(Y, [Pair(array, array.copy())], Tolerance(0.1, 0.1)) is None
    found = compare(Y, [Pair(array, EXPECTED)], Tolerance(0.1, 0.1))
    assert found is not None
    assert found.reason is Reason.GOLDEN_MISMATCH


def test_top1_agreement_counts_samples() -> None:
    pairs = [pair(0.1, 0.7, 0.2)] * 3 + [pair(0.7, 0.1, 0.2)]
    assert compare(Y, pairs, Tolerance(1, 0, 0.75)) is None
    found = compare(Y, pairs, Tolerance(1, 0, 0.8))
    assert found is not None
    assert "3 of 4" in found.what
    assert "80.0%" in found.what
    assert compare(Y, pairs, Tolerance(1, 0)) is None


def test_another_shape_or_type() -> None:
    found = compare(Y, [Pair(EXPECTED, EXPECTED[:, :2])], Tolerance(1, 1))
    assert found is not None
    assert "[1, 2], expected float32 [1, 3]" in found.what
    found = compare(Y, [Pair(EXPECTED, EXPECTED.astype(np.float64))], Tolerance(1, 1))
    assert found is not None
    assert "float64" in found.what


def test_integers_and_text() -> None:
    whole = Tensor("n", "INT64", [-1])
    numbers = np.array([1, 2], np.int64)
    assert compare(whole, [Pair(numbers, numbers + 1)], Tolerance(1, 0)) is None
    assert compare(whole, [Pair(numbers, numbers + 2)], Tolerance(1, 0)) is not None
    text = Tensor("s", "BYTES", [-1])
    words = np.array([b"a", b"b"], np.object_)
    assert compare(text, [Pair(words, words.copy())], Tolerance(0, 0, 1.0)) is None
    assert compare(text, [Pair(words, words[::-1])], Tolerance(9, 9)) is not None
