"""What a manifest may say beyond its types."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from edge_contract import canonical, manifest
from edge_contract.errors import BundleRejected, Reason
from tests.unit.edge_contract.samples import MANIFEST

Document = dict[str, Any]


def plain() -> Document:
    document: Document = json.loads(manifest.to_bytes(MANIFEST))
    return document


def setting(path: str, value: Any) -> Callable[[Document], None]:
    """A change of one field, by its path: `files.0.name`."""

    def change(document: Document) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place: Any = document
        for part in parents:
            place = place[part]
        place[last] = value

    return change


def appending(field: str, value: Any) -> Callable[[Document], None]:
    return lambda document: document[field].append(value)


MODEL = {"role": "model", "name": "other.onnx", "size_bytes": 1, "sha256": "9" * 64}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (setting("files.1.name", "model.onnx"), "'model.onnx' is taken at $.files[1].name"),
        (setting("files.2.name", "manifest.json"), "'manifest.json' is taken at $.files[2].name"),
        (appending("files", MODEL), "exactly one file of role 'model' is needed at $.files"),
        (setting("files.0.role", "labels"), "exactly one file of role 'model' is needed at $.files"),
        (setting("files.1.role", "labels"), "exactly one file of role 'golden' is needed at $.files"),
        (setting("golden.file", "labels.txt"), "'labels.txt' is not the golden file at $.golden.file"),
        (
            appending("inputs", {"name": "image", "datatype": "FP32", "shape": []}),
            "'image' is taken at $.inputs[1].name",
        ),
        (
            appending("outputs", {"name": "logits", "datatype": "FP32", "shape": [1]}),
            "'logits' is taken at $.outputs[1].name",
        ),
        (setting("reference.0.output", "nothing"), "'nothing' is not an output at $.reference[0].output"),
        (setting("files", []), "at $.files"),
        (setting("inputs", []), "at $.inputs"),
        (setting("outputs", []), "at $.outputs"),
        (setting("files.0.name", "../model.onnx"), "at $.files[0].name"),
        (setting("files.0.name", ".hidden"), "at $.files[0].name"),
        (setting("files.0.name", "a/b"), "at $.files[0].name"),
        (setting("files.0.name", "model.onnx\n"), "at $.files[0].name"),
        (setting("files.0.sha256", "A" * 64), "at $.files[0].sha256"),
        (setting("files.0.sha256", "a" * 63), "at $.files[0].sha256"),
        (setting("files.0.sha256", "a" * 64 + "\n"), "at $.files[0].sha256"),
        (setting("files.0.size_bytes", -1), "at $.files[0].size_bytes"),
        (setting("files.0.size_bytes", 2**60), "at $.files[0].size_bytes"),
        (setting("files.0.role", "firmware"), "at $.files[0].role"),
        (setting("name", "Fashion"), "at $.name"),
        (setting("name", "../etc"), "at $.name"),
        (setting("name", "fashion\n"), "at $.name"),
        (setting("version", "1/2"), "at $.version"),
        (setting("version", ""), "at $.version"),
        (setting("release", 0), "at $.release"),
        (setting("runtime", "pytorch"), "at $.runtime"),
        (setting("inputs.0.datatype", "float32"), "at $.inputs[0].datatype"),
        (setting("inputs.0.shape", [-2]), "at $.inputs[0].shape[0]"),
        (setting("golden.samples", 0), "at $.golden.samples"),
        (setting("golden.tolerance.atol", -0.1), "at $.golden.tolerance.atol"),
        (setting("golden.tolerance.top1_agreement", 1.1), "at $.golden.tolerance.top1_agreement"),
        (setting("expected.p50_ms", 0), "at $.expected.p50_ms"),
        (setting("session.threads", 0), "at $.session.threads"),
        (setting("lineage.calibration_sha256", ""), "at $.lineage.calibration_sha256"),
        (setting("lineage.metrics.0.split", "calibration"), "at $.lineage.metrics[0].split"),
    ],
)
def test_refusals_name_the_field(change: Callable[[Document], None], where: str) -> None:
    document = plain()
    change(document)
    with pytest.raises(BundleRejected) as caught:
        manifest.from_bytes(json.dumps(document).encode())
    assert caught.value.reason is Reason.MANIFEST_INVALID
    assert caught.value.what.startswith("manifest: ")
    assert caught.value.what.endswith(where)


def test_oversize_is_refused_before_it_is_parsed() -> None:
    data = manifest.to_bytes(MANIFEST)
    with pytest.raises(BundleRejected, match="over the limit"):
        manifest.from_bytes(data + b" " * manifest.LIMIT_BYTES)


def test_a_duplicate_key_deep_inside_is_refused() -> None:
    data = manifest.to_bytes(MANIFEST).replace(b'"atol":0.05', b'"atol":0.05,"atol":9.0')
    with pytest.raises(BundleRejected, match=r"duplicate key at \$\.golden\.tolerance\.atol"):
        manifest.from_bytes(data)


def test_optional_fields_may_be_left_out() -> None:
    document = plain()
    del document["reference"]
    document["session"] = {}
    document["needs"] = {"memory_bytes": 1}
    del document["lineage"]["calibration_sha256"]
    read = manifest.from_bytes(json.dumps(document).encode())
    assert (read.reference, read.session.threads, read.needs.isa) == ([], 1, [])
    assert not read.session.spinning


def test_a_manifest_finds_its_files_and_size() -> None:
    assert MANIFEST.file("golden").name == "golden.npz"
    assert MANIFEST.size_bytes == 91_234 + 12_345 + 77


def changed(path: str, value: Any) -> manifest.Manifest:
    document = plain()
    document["reference"] = []
    setting(path, value)(document)
    return manifest.from_bytes(json.dumps(document).encode())


def test_a_twin_and_a_wider_interface_serve_the_same_clients() -> None:
    assert manifest.interface_change(MANIFEST, manifest.from_bytes(manifest.to_bytes(MANIFEST))) == ""
    fixed = changed("inputs.0.shape", [1, *MANIFEST.inputs[0].shape[1:]])
    assert manifest.interface_change(fixed, MANIFEST) == ""
    more = [*plain()["outputs"], {"name": "extra", "datatype": "FP32", "shape": [1]}]
    assert manifest.interface_change(MANIFEST, changed("outputs", more)) == ""


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("inputs.0.name", "picture", "is now picture FP32"),
        ("inputs.0.datatype", "FP16", "FP16"),
        ("inputs.0.shape", [1, 1, 28, 28], "is now image FP32 [1, 1, 28, 28]"),
        ("outputs.0.shape", [-1, 11], "its output logits FP32 [-1, 10] is now logits FP32 [-1, 11]"),
    ],
)
def test_what_clients_would_notice_is_named(path: str, value: Any, named: str) -> None:
    assert named in manifest.interface_change(MANIFEST, changed(path, value))


def test_an_input_more_and_an_output_less_are_changes() -> None:
    two = [*plain()["inputs"], {"name": "mask", "datatype": "FP32", "shape": [1]}]
    assert manifest.interface_change(MANIFEST, changed("inputs", two)) == "it takes 2 inputs instead of 1"
    outputs = [*plain()["outputs"], {"name": "extra", "datatype": "FP32", "shape": [1]}]
    wide = changed("outputs", outputs)
    assert manifest.interface_change(wide, MANIFEST) == "it gives 1 outputs instead of 2"


def test_addresses() -> None:
    digest = "ab" + "0" * 62
    assert manifest.blob_path(digest) == f"blobs/sha256/ab/{digest}"
    assert manifest.target_name("fashion", "1.2.0") == "models/fashion/1.2.0.json"
    assert manifest.parse_reference("fashion@1.2.0") == ("fashion", "1.2.0")


@pytest.mark.parametrize(
    "text", ["fashion", "fashion@", "@1.0", "a@b@c", "Fashion@1", "a/b@1", "a@1/2", "a@1\n"]
)
def test_a_bad_reference_is_refused(text: str) -> None:
    with pytest.raises(canonical.DecodeFault):
        manifest.parse_reference(text)
