"""Ranges of activations."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer import calibrate, runtime
from optimizer.passes.shapes import Shapes
from tests.unit.optimizer.passes.graphs import model

TEXT = """
g (float[N,8] x) => (float[N,8] y, int64[N] top) {
  a = Neg(x)
  y = Relu(a)
  top = ArgMax <axis = 1, keepdims = 0> (y)
}
"""
NET = Shapes().apply(model(TEXT))
X = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)


def test_every_float_value_that_flows_is_observed() -> None:
    assert calibrate.observable(NET) == ["x", "a", "y"]


def test_minimum_and_maximum_are_those_of_all_samples() -> None:
    ranges = calibrate.find_ranges(NET, {"x": X}, None, "minmax")
    assert ranges["x"] == (float(X.min()), float(X.max()))
    assert ranges["a"] == (float(-X.max()), float(-X.min()))
    assert ranges["y"] == (0.0, float(-X.min()))


def test_percentiles_are_numpys() -> None:
    outlier = X.copy()
    outlier[0, 0] = 1000.0
    low, high = calibrate.find_ranges(NET, {"x": outlier}, None, "percentile")["x"]
    bin_width = (1000 - float(X.min())) / calibrate.BINS
    tail = (100 - calibrate.PERCENTILE) / 2
    expected = np.percentile(outlier, [tail, 100 - tail], method="inverted_cdf")
    assert low == pytest.approx(expected[0], abs=2 * bin_width)
    assert high <= 1000.0


def test_outliers_are_cut_off_when_they_are_rarer_than_the_percentile() -> None:
    many = np.random.default_rng(1).normal(size=(20_000, 8)).astype(np.float32)
    many[0, 0] = 50.0
    assert calibrate.find_ranges(NET, {"x": many}, None, "minmax")["x"][1] == 50.0
    assert calibrate.find_ranges(NET, {"x": many}, None, "percentile")["x"][1] < 6.0


@pytest.mark.parametrize("batch", [None, 4, 7])
def test_a_fixed_batch_sees_the_same_ranges(batch: int | None) -> None:
    text = TEXT.replace("[N", f"[{batch}") if batch else TEXT
    fixed = Shapes().apply(model(text))
    free = calibrate.find_ranges(NET, {"x": X}, None, "minmax")
    assert calibrate.find_ranges(fixed, {"x": X}, batch, "minmax") == free


def test_the_chunk_keeps_activations_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = runtime.observe

    def watch(*args: object, **kwargs: object) -> object:
        for values in real(*args, **kwargs):  # type: ignore[arg-type]
            sizes.append(sum(v.nbytes for v in values.values()))
            yield values

    monkeypatch.setattr(runtime, "observe", watch)
    monkeypatch.setattr(calibrate, "CHUNK_BYTES", 1000)
    calibrate.find_ranges(NET, {"x": X}, None, "minmax")
    assert len(sizes) > 20
    assert max(sizes) <= 1000


def test_histograms_count_everything() -> None:
    values = np.linspace(-1, 1, 1001, dtype=np.float32)
    counts = calibrate.histogram(values, -1.0, 1.0)
    assert counts.sum() == 1001
    assert counts.shape == (calibrate.BINS,)
    assert calibrate.histogram(np.ones(5, np.float32), 1.0, 1.0).sum() == 5


def test_a_constant_tensor_keeps_its_value_in_range() -> None:
    counts = calibrate.histogram(np.full(100, 3.0, np.float32), 3.0, 3.0)
    assert calibrate.percentile_range(counts, 3.0, 3.0) == (3.0, 3.0)
