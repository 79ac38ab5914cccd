"""This device's own form of a model: made, found, used, and passed over when it is not sound."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.serving import adapt, package, prepared
from edge_agent.serving.loader import open_version
from edge_agent.update.store import Store
from edge_contract.manifest import Tensor, Tolerance
from tests.support.models import BundleOnDisk, install, make_bundle, samples, scores, write_bundle
from tests.support.tflite import tiny_tflite

ROOM = 1 << 30
X = samples(3, features=64)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(Config("acme", "box-1", state_dir=str(tmp_path / "state"), run_dir=str(tmp_path / "run")))


@pytest.fixture
def bundle(tmp_path: Path, layout: Layout) -> BundleOnDisk:
    """Large enough that its weights lie outside the graph."""
    made = make_bundle(tmp_path, features=64, classes=32)
    install(made, layout)
    return made


@pytest.fixture
def form(bundle: BundleOnDisk, layout: Layout) -> Path:
    """The folder of a form that was just made."""
    made = adapt.run(layout.version(bundle.digest), layout.prepared, ROOM)
    assert made.made, made
    (folder,) = (layout.prepared / bundle.digest).iterdir()
    return folder


def served_form(layout: Layout, bundle: BundleOnDisk) -> str:
    """Which form is loaded; it answers right in any case."""
    opened = open_version(layout, "tiny", bundle.digest)
    answer = opened.model.run({"x": X})["scores"]
    opened.model.close()
    np.testing.assert_allclose(answer, scores(X, features=64, classes=32), atol=1e-5)
    return opened.form


def test_without_a_form_the_original_serves(layout: Layout, bundle: BundleOnDisk) -> None:
    assert served_form(layout, bundle) == "original"


def test_a_form_serves_and_its_weights_are_beside_the_graph(
    layout: Layout, bundle: BundleOnDisk, form: Path
) -> None:
    assert served_form(layout, bundle) == "prepared"
    assert sorted(p.name for p in form.iterdir()) == ["model.onnx", "prepared.json", "weights.bin"]
    assert (form / "weights.bin").stat().st_size >= 64 * 32 * 4


def test_a_form_is_made_once(layout: Layout, bundle: BundleOnDisk, form: Path) -> None:
    before = (form / "weights.bin").stat().st_ino
    assert adapt.run(layout.version(bundle.digest), layout.prepared, ROOM).made
    assert (form / "weights.bin").stat().st_ino == before


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "prepared.json"])
@pytest.mark.parametrize("damage", ["flip", "zero", "cut", "gone", "empty"])
def test_a_damaged_form_is_not_served_and_can_be_made_again(
    layout: Layout, bundle: BundleOnDisk, form: Path, name: str, damage: str
) -> None:
    path = form / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    bad = {
        "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "zero": b"\0" * len(whole),
        "cut": whole[:middle],
        "empty": b"",
    }
    path.unlink()
    if damage in bad:
        path.write_bytes(bad[damage])
    assert served_form(layout, bundle) == "original"
    assert adapt.run(layout.version(bundle.digest), layout.prepared, ROOM).made
    assert served_form(layout, bundle) == "prepared"


def test_weights_that_decay_unseen_are_noticed_by_the_first_answer(
    layout: Layout, bundle: BundleOnDisk, form: Path
) -> None:
    """Same size, inode and time of change, as a disk that forgets leaves it."""
    path = form / "weights.bin"
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"\x41" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    stored = package.read(layout.version(bundle.digest))
    assert prepared.find(layout.prepared, stored) is not None
    assert served_form(layout, bundle) == "original"
    assert adapt.run(layout.version(bundle.digest), layout.prepared, ROOM).made
    assert served_form(layout, bundle) == "prepared"


def test_a_form_that_was_copied_back_is_hashed_and_used(
    layout: Layout, bundle: BundleOnDisk, form: Path
) -> None:
    path = form / "weights.bin"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole)
    assert served_form(layout, bundle) == "prepared"


def test_another_runtime_or_cpu_needs_another_form(
    layout: Layout, bundle: BundleOnDisk, form: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "_processor", lambda: ("another", ["neon"]))
    assert served_form(layout, bundle) == "original"
    assert adapt.run(layout.version(bundle.digest), layout.prepared, ROOM).made
    assert served_form(layout, bundle) == "prepared"
    assert not form.exists()  # one key at a time


def test_a_form_of_another_version_is_not_taken(
    tmp_path: Path, layout: Layout, bundle: BundleOnDisk, form: Path
) -> None:
    other = make_bundle(tmp_path, version="2.0.0", features=64, classes=32, seed=5)
    install(other, layout)
    form.parent.rename(layout.prepared / other.digest)
    assert open_version(layout, "tiny", other.digest).form == "original"


def test_without_room_the_original_serves(layout: Layout, bundle: BundleOnDisk) -> None:
    for room in (100, bundle.manifest.file("model").size_bytes + 10):
        found = adapt.run(layout.version(bundle.digest), layout.prepared, room)
        assert not found.made
        assert f"more than the {room} bytes" in found.what
    assert served_form(layout, bundle) == "original"
    assert list((layout.prepared / bundle.digest).iterdir()) == []


def test_a_form_that_answers_otherwise_is_not_kept(
    layout: Layout, bundle: BundleOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = make_bundle(tmp_path, name="wrong", features=64, classes=32, seed=9).blob("model")
    monkeypatch.setattr(prepared, "optimise", lambda spec, folder: _copy(wrong, folder))
    found = adapt.run(layout.version(bundle.digest), layout.prepared, ROOM)
    assert not found.made
    assert "golden values differ" in found.what
    assert served_form(layout, bundle) == "original"


@pytest.mark.parametrize(("original_ms", "form_ms", "slower"), [(0.014, 0.026, False), (1.0, 1.6, True)])
def test_a_slower_form_is_told_from_noise(original_ms: float, form_ms: float, slower: bool) -> None:
    assert bool(adapt._slower(original_ms, form_ms)) is slower


def _copy(source: Path, folder: Path) -> Path:
    target = folder / "model.onnx"
    target.write_bytes(source.read_bytes())
    return target


def test_tflite_has_no_form(tmp_path: Path, layout: Layout) -> None:
    x = samples(4)
    bundle = write_bundle(
        tmp_path / "bundle",
        "tiny",
        "1",
        1,
        model=tiny_tflite(),
        inputs=[Tensor("x", "FP32", [-1, 8])],
        outputs=[Tensor("scores", "FP32", [-1, 4])],
        golden={"input:x": x, "output:scores": scores(x)},
        tolerance=Tolerance(1e-5, 0, 1.0),
        runtime="tflite",
    )
    install(bundle, layout)
    found = adapt.run(layout.version(bundle.digest), layout.prepared, ROOM)
    assert (found.made, found.what) == (False, "no prepared form: tflite has none")


def test_a_form_goes_with_its_version(layout: Layout, bundle: BundleOnDisk, form: Path) -> None:
    store = Store(layout)
    store.collect({bundle.digest})
    assert form.is_dir()
    store.collect(set())
    if layout.current("tiny").exists():  # what serves is never collected
        assert form.is_dir()
        layout.current("tiny").unlink()
        store.collect(set())
    assert list(layout.prepared.iterdir()) == []
