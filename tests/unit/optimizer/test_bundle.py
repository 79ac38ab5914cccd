"""Bundles: what is in them, and that they are reproducible."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_contract import manifest as contract
from edge_contract.bench import Measured
from edge_contract.errors import InputRejected
from edge_contract.manifest import Metric, Reference, Tensor, Tolerance
from optimizer import bundle, probation
from optimizer.bundle import Content
from tests.unit.edge_contract.samples import PROFILE

SCORES = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 4.0, 1.0]], np.float32)


def content(**fields: Any) -> Content:
    defaults: dict[str, Any] = {
        "name": "net",
        "version": "2.1",
        "release": 3,
        "profile": PROFILE,
        "precision": "static_int8",
        "recipe": "static_int8_minmax: words",
        "model": b"model bytes",
        "inputs": [Tensor("image", "FP32", [-1, 2])],
        "outputs": [Tensor("scores", "FP32", [-1, 3])],
        "batch": None,
        "golden": {"input:image": np.ones((3, 2), np.float32), "output:scores": SCORES},
        "selection_outputs": {"scores": SCORES},
        "measured": Measured("m", "0" * 64, 11, 20.0, 60_000_000, 1.5, 2.5, 1.4, 0.7, 100),
        "reference_ms": 4.0,
        "source_sha256": "a" * 64,
        "calibration_sha256": "b" * 64,
        "metrics": [Metric("top1", "selection", 0.9, 0.91, 100)],
    }
    return Content(**{**defaults, **fields})


def test_the_folder_holds_the_manifest_and_its_blobs(tmp_path: Path) -> None:
    made = bundle.write(content(), tmp_path)
    assert contract.from_bytes((tmp_path / "manifest.json").read_bytes()) == made
    assert contract.to_bytes(made) == (tmp_path / "manifest.json").read_bytes()
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"manifest.json", *(contract.blob_path(f.sha256) for f in made.files)}
    for file in made.files:
        data = (tmp_path / contract.blob_path(file.sha256)).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file.sha256
        assert len(data) == file.size_bytes
    assert (tmp_path / contract.blob_path(made.file("model").sha256)).read_bytes() == b"model bytes"


def test_what_the_manifest_says(tmp_path: Path) -> None:
    made = bundle.write(content(), tmp_path)
    assert (made.name, made.version, made.release, made.runtime) == ("net", "2.1", 3, PROFILE.runtime)
    assert made.needs.architectures == [PROFILE.architecture]
    assert made.needs.isa == sorted(PROFILE.isa)
    assert made.session == PROFILE.session
    assert made.expected.p50_ms == 1.5
    assert made.expected.reference_ms == 4.0
    assert made.lineage.recipe == "static_int8_minmax: words"
    assert made.lineage.profile == PROFILE.name
    assert made.reference == [Reference("scores", [1, 2, 0])]
    assert made.golden.samples == 3
    assert made.golden.tolerance.top1_agreement == 0.75


def test_golden_vectors_can_be_read_back() -> None:
    arrays = {"input:x": np.arange(6, dtype=np.int64).reshape(2, 3), "output:y": SCORES.T}
    with np.load(io.BytesIO(bundle.npz_bytes(arrays)), allow_pickle=False) as found:
        assert set(found.files) == set(arrays)
        for name, value in arrays.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype


def test_the_same_arrays_are_the_same_bytes() -> None:
    one = bundle.npz_bytes({"a": SCORES, "b": np.ones(3)})
    other = bundle.npz_bytes({"b": np.ones(3), "a": np.asfortranarray(SCORES)})
    assert one == other


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("fp32", Tolerance(4e-4, 1e-3, 0.75)),
        ("fp16", Tolerance(4e-2, 1e-2, 0.75)),
        ("static_int8", Tolerance(0.2, 0.0, 0.75)),
        ("dynamic_int8", Tolerance(0.2, 0.0, 0.75)),
    ],
)
def test_tolerances_follow_the_range_of_the_outputs(family: Any, expected: Tolerance) -> None:
    found = bundle.tolerance(family, {"y": SCORES, "small": SCORES / 100}, classes=True)
    assert found.atol == pytest.approx(expected.atol)
    assert (found.rtol, found.top1_agreement) == (expected.rtol, expected.top1_agreement)
    assert bundle.tolerance(family, {"y": SCORES}, classes=False).top1_agreement == 0.0


@pytest.mark.parametrize(
    ("samples", "batch", "count"), [(100, None, 8), (100, 1, 8), (100, 4, 8), (100, 3, 9), (100, 32, 32)]
)
def test_golden_samples_are_spread_and_fill_whole_batches(
    samples: int, batch: int | None, count: int
) -> None:
    places = bundle.golden_places(samples, batch)
    assert len(places) == len(set(places)) == count
    assert (places[0], places[-1]) == (0, samples - 1)


def test_a_golden_sample_is_what_one_inference_takes(tmp_path: Path) -> None:
    golden = {"input:image": np.ones((8, 2), np.float32), "output:scores": np.ones((8, 3), np.float32)}
    made = bundle.write(content(batch=4, golden=golden, inputs=[Tensor("image", "FP32", [4, 2])]), tmp_path)
    assert made.golden.samples == 2


@pytest.mark.parametrize(("peak", "need"), [(60_000_000, 83_886_080), (1, 16 << 20), (0, 0)])
def test_memory_needs_have_a_margin_and_round_steps(peak: int, need: int) -> None:
    assert bundle.memory_need(peak) == need


def test_only_class_like_outputs_have_reference_counts(tmp_path: Path) -> None:
    outputs = {
        "scores": SCORES,
        "column": SCORES[:, :1],
        "map": np.ones((3, 2, 2), np.float32),
        "ids": np.ones((3, 2), np.int64),
    }
    tensors = [
        Tensor("scores", "FP32", [-1, 3]),
        Tensor("column", "FP32", [-1, 1]),
        Tensor("map", "FP32", [-1, 2, 2]),
        Tensor("ids", "INT64", [-1, 2]),
    ]
    made = bundle.write(content(selection_outputs=outputs, outputs=tensors), tmp_path)
    assert [r.output for r in made.reference] == ["scores"]


def test_terms_of_probation_are_in_the_manifest_if_there_are_any(tmp_path: Path) -> None:
    file = tmp_path / "probation.toml"
    file.write_text("probation_s = 600\nmax_drift = 0.1\n")
    for name, terms in (("with", {"probation": probation.load(file)}), ("without", {})):
        (tmp_path / name).mkdir()
        bundle.write(content(**terms), tmp_path / name)
    plain = json.loads((tmp_path / "with" / "manifest.json").read_bytes())
    assert plain["probation"] == {"probation_s": 600, "max_drift": 0.1}
    assert "probation" not in json.loads((tmp_path / "without" / "manifest.json").read_bytes())


@pytest.mark.parametrize(
    ("text", "told"), [("max_drfit = 1", "max_drfit"), ("max_drift = 2", "$.max_drift"), ("=", "not TOML")]
)
def test_wrong_terms_of_probation_are_named(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "probation.toml"
    file.write_text(text)
    with pytest.raises(InputRejected) as error:
        probation.load(file)
    assert told in error.value.what
    assert "probation_min_requests" in error.value.next_step
    with pytest.raises(InputRejected):
        probation.load(tmp_path / "none.toml")
