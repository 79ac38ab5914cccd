"""Shapes, samples and interfaces."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.serving.tensors import NUMPY, admits, difference, sample, sample_shape, synthetic
from edge_contract.manifest import Datatype, Tensor


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        ([-1, 3], [5, 3], True),
        ([-1, 3], [0, 3], False),
        ([-1, 3], [5, 4], False),
        ([-1, 3], [5, 3, 1], False),
        ([2], [2], True),
        ([], [], True),
        ([0], [0], False),
    ],
)
def test_admits(spec: list[int], shape: list[int], expected: bool) -> None:
    assert admits(spec, shape) is expected


def test_interfaces_that_agree() -> None:
    assert difference([Tensor("x", "FP32", [-1, 3])], [Tensor("x", "FP32", [1, 3])]) is None


@pytest.mark.parametrize(
    "found",
    [
        Tensor("y", "FP32", [-1, 3]),
        Tensor("x", "FP64", [-1, 3]),
        Tensor("x", "FP32", [-1, 4]),
        Tensor("x", "FP32", [3]),
    ],
)
def test_interfaces_that_differ(found: Tensor) -> None:
    said = difference([Tensor("x", "FP32", [-1, 3])], [found])
    assert said is not None
    assert "x FP32 [-1, 3]" in said
    assert str(found.shape) in said


@pytest.mark.parametrize("datatype", list(NUMPY))
def test_synthetic_samples_fit_their_tensor(datatype: Datatype) -> None:
    tensor = Tensor("t", datatype, [-1, 3, -1])
    value = synthetic(tensor, np.random.default_rng(0))
    assert value.shape == sample_shape(tensor) == (1, 3, 64)
    assert value.dtype == NUMPY[datatype]
    assert admits(tensor.shape, value.shape)


def test_synthetic_floats_are_not_all_alike() -> None:
    value = synthetic(Tensor("t", "FP32", [1, 100]), np.random.default_rng(0))
    assert value.min() >= 0
    assert value.max() < 1
    assert len(np.unique(value)) > 50


@pytest.mark.parametrize(
    ("shape", "stack", "expected"),
    [
        ([-1, 2], (3, 2), (1, 2)),  # a free batch: one row is a sample
        ([1, 2], (3, 2), (1, 2)),
        ([4, 2], (8, 2), (4, 2)),  # a fixed batch: its rows are
        ([2], (3, 2), (2,)),  # no batch axis: samples are stacked
        ([], (3,), ()),
        ([-1, 2], (3, 5, 2), (5, 2)),  # stacked batches
    ],
)
def test_samples_are_cut_along_the_first_axis(
    shape: list[int], stack: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(stack), dtype=np.float32).reshape(stack)
    first = sample(array, Tensor("t", "FP32", shape), 0)
    second = sample(array, Tensor("t", "FP32", shape), 1)
    assert first is not None
    assert second is not None
    assert first.shape == second.shape == expected
    np.testing.assert_array_equal(
        np.concatenate([first.ravel(), second.ravel()]), array.ravel()[: 2 * first.size]
    )


@pytest.mark.parametrize(
    ("array", "index"),
    [
        (np.zeros((3, 2), np.float32), 3),
        (np.zeros((3, 4), np.float32), 0),
        (np.zeros((3, 2), np.float64), 0),
        (np.zeros(2, np.float32), 0),
        (np.array([["a", "b"]]), 0),
    ],
)
def test_arrays_that_hold_no_such_sample(array: np.ndarray, index: int) -> None:
    assert sample(array, Tensor("t", "FP32", [-1, 2]), index) is None


def test_text_arrays_become_bytes() -> None:
    value = sample(np.array([["ä"], ["b"]]), Tensor("s", "BYTES", [-1, 1]), 0)
    assert value is not None
    assert value.tolist() == [["ä".encode()]]
