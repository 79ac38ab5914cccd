"""Data splits: what is accepted, and what is said of the rest."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_contract.errors import InputRejected, Reason
from optimizer import data as splits
from optimizer.artifact import Artifact, open_model
from tests.unit.optimizer import nets


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = nets.save(tmp_path_factory.mktemp("model") / "m.onnx", nets.classifier())
    return open_model(path, "onnxruntime")


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


IMAGE, LABEL = nets.images(20, seed=7)


def test_a_good_split(artifact: Artifact, tmp_path: Path) -> None:
    path = write(tmp_path / "s.npz", image=IMAGE, label=LABEL, weight=np.ones(20))
    split = splits.load(path, "selection", artifact)
    assert split.samples == 20
    assert list(split.inputs) == ["image"]
    assert list(split.extra) == ["label", "weight"]
    splits.require_labels(split, 4)
    splits.require_enough(split, minimum=20, why="")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"picture": IMAGE, "label": LABEL},
            "no array 'image', an input of the model (found: picture, label)",
        ),
        ({}, "no array 'image', an input of the model (found: nothing)"),
        (
            {"image": IMAGE.reshape(20, 64)},
            "array 'image' is float32 [20, 64], expected float32 [samples, 1, 8, 8]",
        ),
        (
            {"image": IMAGE[:, :, :7]},
            "array 'image' is float32 [20, 1, 7, 8], expected float32 [samples, 1, 8, 8]",
        ),
        (
            {"image": (IMAGE * 255).astype(np.uint8)},
            "array 'image' is uint8 [20, 1, 8, 8], expected float32 [samples, 1, 8, 8]",
        ),
        (
            {"image": IMAGE.astype(np.float64)},
            "array 'image' is float64 [20, 1, 8, 8], expected float32 [samples, 1, 8, 8]",
        ),
        ({"image": np.float32(1)}, "array 'image' is float32 [], expected float32 [samples, 1, 8, 8]"),
        ({"image": IMAGE, "label": LABEL[:19]}, "differ in their number of samples (image: 20, label: 19)"),
        ({"image": IMAGE, "label": LABEL, "note": np.array("a")}, "differ in their number of samples"),
        (
            {"image": np.where(np.arange(20).reshape(-1, 1, 1, 1) == 3, np.nan, IMAGE).astype(np.float32)},
            "array 'image' holds 64 values that are NaN or infinite, first in sample 3",
        ),
        ({"image": np.array([{}], dtype=object)}, "not a readable NPZ file"),
    ],
)
def test_arrays_that_do_not_fit(
    arrays: dict[str, Any], words: str, artifact: Artifact, tmp_path: Path
) -> None:
    path = write(tmp_path / "s.npz", **arrays)
    with pytest.raises(InputRejected) as caught:
        splits.load(path, "calibration", artifact)
    assert caught.value.reason is Reason.DATA_MISMATCH
    assert caught.value.what.startswith(f"calibration split {path}: ")
    assert words in caught.value.what


def test_an_empty_split(artifact: Artifact, tmp_path: Path) -> None:
    path = write(tmp_path / "s.npz", image=IMAGE[:0], label=LABEL[:0])
    with pytest.raises(InputRejected, match="is empty") as caught:
        splits.load(path, "test", artifact)
    assert caught.value.reason is Reason.DATA_TOO_SMALL


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (LABEL.astype(np.float32), "array 'label' is float32 [20], expected integers of shape [20]"),
        (LABEL.reshape(20, 1), "array 'label' is int64 [20, 1], expected integers of shape [20]"),
        (np.where(np.arange(20) == 5, 4, LABEL), "array 'label' holds 4, expected classes from 0 to 3"),
        (np.where(np.arange(20) == 5, -1, LABEL), "array 'label' holds -1, expected classes from 0 to 3"),
    ],
)
def test_labels_that_do_not_fit(label: Any, words: str, artifact: Artifact, tmp_path: Path) -> None:
    split = splits.load(write(tmp_path / "s.npz", image=IMAGE, label=label), "test", artifact)
    with pytest.raises(InputRejected) as caught:
        splits.require_labels(split, 4)
    assert caught.value.reason is Reason.DATA_MISMATCH
    assert words in caught.value.what


def test_absent_labels_and_labels_of_unknown_range(artifact: Artifact, tmp_path: Path) -> None:
    split = splits.load(write(tmp_path / "s.npz", image=IMAGE), "test", artifact)
    with pytest.raises(InputRejected, match=r"'label' is missing \(found: image\)"):
        splits.require_labels(split, 4)
    high = splits.load(write(tmp_path / "h.npz", image=IMAGE, label=LABEL + 100), "test", artifact)
    splits.require_labels(high, None)


@pytest.mark.parametrize(
    "content", [b"", b"no archive at all", b"PK\x03\x04 truncated", b"\x93NUMPY\x01\x00"]
)
def test_files_that_are_no_npz(content: bytes, artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    path.write_bytes(content)
    with pytest.raises(InputRejected) as caught:
        splits.load(path, "test", artifact)
    assert caught.value.reason is Reason.DATA_MISMATCH
    assert str(path) in caught.value.what


def test_a_truncated_archive_a_single_array_and_a_missing_file(artifact: Artifact, tmp_path: Path) -> None:
    whole = write(tmp_path / "s.npz", image=IMAGE).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-200])
    np.save(tmp_path / "array.npy", IMAGE)
    for name, words in (
        ("cut.npz", "not a readable NPZ"),
        ("array.npy", "a single array"),
        ("none", "not a file"),
    ):
        with pytest.raises(InputRejected, match=words):
            splits.load(tmp_path / name, "test", artifact)


def test_a_pickle_is_never_loaded(artifact: Artifact, tmp_path: Path) -> None:
    path, trace = tmp_path / "s.npz", tmp_path / "trace"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputRejected):
        splits.load(path, "test", artifact)
    np.savez(path, image=np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(InputRejected):
        splits.load(path, "test", artifact)
    assert not trace.exists()


def test_too_few_samples_name_both_counts_and_why(artifact: Artifact, tmp_path: Path) -> None:
    split = splits.load(write(tmp_path / "s.npz", image=IMAGE), "selection", artifact)
    with pytest.raises(InputRejected, match="has 20 samples, 100 or more are needed: because") as caught:
        splits.require_enough(split, minimum=100, why="because")
    assert caught.value.reason is Reason.DATA_TOO_SMALL


@pytest.mark.parametrize(("drop", "minimum"), [(0.01, 100), (0.03, 34), (0.5, 16), (0.0, 16), (0.001, 1000)])
def test_one_answer_must_not_weigh_more_than_the_drop(drop: float, minimum: int) -> None:
    assert splits.minimum_scored(drop) == minimum


def test_splits_must_not_share_samples(artifact: Artifact, tmp_path: Path) -> None:
    first = splits.load(write(tmp_path / "a.npz", image=IMAGE[:12]), "calibration", artifact)
    second = splits.load(write(tmp_path / "b.npz", image=IMAGE[10:], label=LABEL[10:]), "selection", artifact)
    with pytest.raises(InputRejected) as caught:
        splits.require_disjoint([first, second])
    assert caught.value.reason is Reason.DATA_MISMATCH
    assert "shares 2 samples with the calibration split" in caught.value.what
    assert "sample 0 is its sample 10" in caught.value.what


def test_a_sample_may_repeat_within_its_split(artifact: Artifact, tmp_path: Path) -> None:
    twice = np.concatenate([IMAGE[:10], IMAGE[:10]])
    first = splits.load(write(tmp_path / "a.npz", image=twice), "calibration", artifact)
    second = splits.load(write(tmp_path / "b.npz", image=IMAGE[10:]), "selection", artifact)
    splits.require_disjoint([first, second])


def test_the_digest_is_of_the_content(artifact: Artifact, tmp_path: Path) -> None:
    plain = splits.load(write(tmp_path / "a.npz", image=IMAGE, label=LABEL), "test", artifact)
    np.savez_compressed(tmp_path / "b.npz", label=LABEL, image=IMAGE)
    packed = splits.load(tmp_path / "b.npz", "test", artifact)
    other = splits.load(write(tmp_path / "c.npz", image=IMAGE, label=LABEL[::-1]), "test", artifact)
    assert plain.digest == packed.digest
    assert plain.digest != other.digest
