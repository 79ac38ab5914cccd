"""NPZ files of inputs and of golden vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent.serving.arrays import first_sample, golden_samples
from edge_contract.errors import BundleRejected, InputRejected, Reason
from edge_contract.manifest import Tensor
from tests.support.models import make_bundle, npz, samples, scores

X = Tensor("x", "FP32", [-1, 8])


def write(path: Path, **arrays: np.ndarray) -> Path:
    path.write_bytes(npz({name.replace("__", ":"): array for name, array in arrays.items()}))
    return path


def test_the_first_sample_by_either_name(tmp_path: Path) -> None:
    x = samples(4)
    for name in ("x", "input__x"):
        got = first_sample(write(tmp_path / "in.npz", **{name: x}, label=np.zeros(4)), [X])
        np.testing.assert_array_equal(got["x"], x[:1])


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"image": samples(1)}, "has image; the model's input is x FP32 [-1, 8]"),
        ({"x": samples(2, features=7)}, "'x' is float32 [2, 7]; the model takes x FP32 [-1, 8]"),
        ({"x": samples(2).astype(np.float64)}, "'x' is float64 [2, 8]"),
        ({"x": samples(2)[0]}, "'x' is float32 [8]"),
        ({}, "has no arrays"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str) -> None:
    with pytest.raises(InputRejected) as refusal:
        first_sample(write(tmp_path / "in.npz", **arrays), [X])
    assert refusal.value.reason is Reason.DATA_MISMATCH
    assert expected in refusal.value.what


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("x = 1")
    np.save(tmp_path / "one.npy", samples(1))
    whole = npz({"x": samples(100)})
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    np.savez(tmp_path / "pickled.npz", x=np.array([{"a": 1}], np.object_))
    for name in ("text.npz", "one.npy", "cut.npz", "flipped.npz", "pickled.npz", "absent.npz"):
        with pytest.raises(InputRejected) as refusal:
            first_sample(tmp_path / name, [X])
        assert name in refusal.value.what


def test_golden_samples_one_by_one(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    found = golden_samples(bundle.blob("golden"), bundle.manifest)
    x = samples(8)
    assert len(found) == 8
    np.testing.assert_array_equal(found[5].inputs["x"], x[5:6])
    np.testing.assert_array_equal(found[5].outputs["scores"], scores(x)[5:6])


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"input__x": samples(8)}, "lack the array output:scores"),
        ({"input__x": samples(7), "output__scores": scores(samples(8))}, "sample 7 does not fit x FP32"),
        ({"input__x": samples(8), "output__scores": scores(samples(8))[:, :3]}, "golden output:scores is"),
    ],
)
def test_golden_vectors_that_are_not_what_the_manifest_says(
    tmp_path: Path, arrays: dict[str, np.ndarray], expected: str
) -> None:
    manifest = make_bundle(tmp_path).manifest
    with pytest.raises(BundleRejected) as refusal:
        golden_samples(write(tmp_path / "golden.npz", **arrays), manifest)
    assert refusal.value.reason is Reason.MANIFEST_INVALID
    assert expected in refusal.value.what
