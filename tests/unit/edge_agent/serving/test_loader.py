"""From the store to a warm version, and every way in which a version is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent import facts
from edge_agent.config import Config
from edge_agent.layout import MANIFEST, Layout
from edge_agent.serving import package, preflight
from edge_agent.serving.loader import open_version
from edge_contract.errors import BundleRejected, Reason, RequestRejected
from edge_contract.manifest import Runtime, Tensor, Tolerance
from tests.support.models import install, make_bundle, samples, scores, tiny_net, write_bundle
from tests.support.tflite import tiny_tflite


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(Config("acme", "box-1", state_dir=str(tmp_path / "state"), run_dir=str(tmp_path / "run")))


def test_a_version_is_opened_and_has_answered(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path)
    install(bundle, layout)
    opened = open_version(layout, "tiny", bundle.digest)
    assert (opened.manifest, opened.digest) == (bundle.manifest, bundle.digest)
    np.testing.assert_allclose(opened.model.run({"x": samples(2)})["scores"], scores(samples(2)), atol=1e-6)


@pytest.mark.parametrize("runtime", [r for r in ("onnxruntime", "tflite") if r in facts.probe().runtimes])
def test_a_version_of_every_installed_runtime(tmp_path: Path, layout: Layout, runtime: Runtime) -> None:
    x = samples(4)
    bundle = write_bundle(
        tmp_path / "bundle",
        "tiny",
        "1",
        1,
        model=tiny_net() if runtime == "onnxruntime" else tiny_tflite(),
        inputs=[Tensor("x", "FP32", [-1, 8])],
        outputs=[Tensor("scores", "FP32", [-1, 4])],
        golden={"input:x": x, "output:scores": scores(x)},
        tolerance=Tolerance(1e-5, 0, 1.0),
        runtime=runtime,
    )
    install(bundle, layout)
    opened = open_version(layout, "tiny", bundle.digest)
    np.testing.assert_allclose(opened.model.run({"x": x})["scores"], scores(x), atol=1e-6)
    verdict = preflight.run(layout.version(bundle.digest))
    assert verdict.ok, verdict


def refusal(layout: Layout, digest: str, name: str = "tiny") -> BundleRejected:
    with pytest.raises(BundleRejected) as found:
        open_version(layout, name, digest)
    return found.value


@pytest.mark.parametrize(
    ("fault", "reason", "named"),
    [
        ("garbage", Reason.LOAD_FAILED, "model.onnx does not load"),
        ("interface", Reason.MANIFEST_INVALID, "promises scores FP32 [-1, 5]; the model has scores FP32"),
    ],
)
def test_faulty_models(tmp_path: Path, layout: Layout, fault: str, reason: Reason, named: str) -> None:
    bundle = make_bundle(tmp_path, fault=fault)  # type: ignore[arg-type]
    install(bundle, layout)
    found = refusal(layout, bundle.digest)
    assert found.reason is reason
    assert named in found.what


def test_a_version_that_is_not_there(layout: Layout) -> None:
    with pytest.raises(RequestRejected) as found:
        open_version(layout, "tiny", "a" * 64)
    assert found.value.status == 404


def test_a_version_under_another_name(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path)
    install(bundle, layout)
    assert "of the model tiny, not of other" in refusal(layout, bundle.digest, "other").what


def test_a_manifest_that_is_not_the_folders(tmp_path: Path, layout: Layout) -> None:
    bundle, other = make_bundle(tmp_path), make_bundle(tmp_path, version="2")
    install(bundle, layout)
    manifest = layout.version(bundle.digest) / MANIFEST
    manifest.write_bytes((other.folder / MANIFEST).read_bytes())
    assert refusal(layout, bundle.digest).reason is Reason.DIGEST_MISMATCH
    manifest.write_bytes(b"{}")
    assert refusal(layout, bundle.digest).reason is Reason.DIGEST_MISMATCH
    manifest.unlink()
    assert refusal(layout, bundle.digest).reason is Reason.DIGEST_MISMATCH


def test_files_that_are_missing_or_cut(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path)
    model = install(bundle, layout) / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1])
    found = refusal(layout, bundle.digest)
    assert found.reason is Reason.DIGEST_MISMATCH
    assert f"{len(whole) - 1} bytes instead of {len(whole)}" in found.what
    model.unlink()
    assert refusal(layout, bundle.digest).reason is Reason.BLOB_MISSING


def test_golden_vectors_that_cannot_be_read(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path)
    golden = install(bundle, layout) / "golden.npz"
    golden.write_bytes(b"\0" * golden.stat().st_size)
    found = refusal(layout, bundle.digest)  # the disk is at fault, not the bundle
    assert found.reason is Reason.DIGEST_MISMATCH
    assert "golden.npz of version" in found.what


def test_a_model_that_decayed_on_disk_is_noticed_by_its_first_answer(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path)
    model = install(bundle, layout) / "model.onnx"
    other = tiny_net(fault="wrong_weights")
    assert len(other) == model.stat().st_size
    model.write_bytes(other)
    assert refusal(layout, bundle.digest).reason is Reason.DIGEST_MISMATCH


def test_a_version_that_never_answered_right_is_refused(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path, fault="wrong_weights")
    install(bundle, layout)
    assert refusal(layout, bundle.digest).reason is Reason.GOLDEN_MISMATCH


def test_bundle_and_store_folders_are_read_alike(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path)
    store = install(bundle, layout)
    for folder in (bundle.folder, store):
        found = package.read(folder)
        assert found.digest == bundle.digest
        package.check_digests(found)
    assert package.read(store).model == store / "model.onnx"
    assert package.read(bundle.folder).model == bundle.blob("model")


def test_one_flipped_bit_is_found(tmp_path: Path, layout: Layout) -> None:
    store = install(make_bundle(tmp_path), layout)
    data = bytearray((store / "model.onnx").read_bytes())
    data[100] ^= 1
    (store / "model.onnx").write_bytes(data)
    package.check_sizes(package.read(store))
    with pytest.raises(BundleRejected, match=r"model\.onnx has SHA-256") as found:
        package.check_digests(package.read(store))
    assert found.value.reason is Reason.DIGEST_MISMATCH
