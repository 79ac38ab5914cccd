"""What `registry publish` and `registry deltas` offer beside whole blobs, and where it is signed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_contract import encodings
from edge_contract.canonical import sha256_hex
from edge_contract.encodings import LANES, ZSTD, Encodings
from edge_contract.manifest import blob_path
from fleet.cli import main
from fleet.registry.reader import Reader
from tests.support import weights
from tests.support.models import BundleOnDisk, make_bundle
from tests.support.registry_folder import RegistryFolder


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[BundleOnDisk]:
    folder = tmp_path_factory.mktemp("bundles")
    return [weights.bundle(folder, "net", v, change=(v - 1) / 100) for v in range(1, 6)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, versions: list[BundleOnDisk]) -> RegistryFolder:
    """The first four, as `publish` does by itself."""
    made = RegistryFolder.create(tmp_path_factory.mktemp("registry"))
    for bundle in versions[:4]:
        made.publish(bundle, "auto")
    return made


@pytest.fixture
def registry(published: RegistryFolder, tmp_path: Path) -> RegistryFolder:
    return published.copy(tmp_path / "copy")


def offers(registry: RegistryFolder, version: int) -> Encodings | None:
    catalogue = Reader(str(registry.folder), registry.root.read_bytes()).catalogue
    target = catalogue.find(encodings.target_name("net", f"{version}.0.0"))
    if target is None:
        return None
    return encodings.from_bytes(catalogue.blob(blob_path(target.sha256), target))


def bases(document: Encodings | None, bundle: BundleOnDisk, algorithm: str = LANES) -> list[str | None]:
    assert document is not None
    return [e.base_sha256 for e in document.of(model(bundle)) if e.algorithm == algorithm]


def model(bundle: BundleOnDisk) -> str:
    return bundle.manifest.file("model").sha256


def test_a_first_version_is_offered_compressed(
    registry: RegistryFolder, versions: list[BundleOnDisk]
) -> None:
    document = offers(registry, 1)
    assert document is not None
    assert document.manifest_sha256 == versions[0].digest
    assert bases(document, versions[0], ZSTD) == [None]
    assert bases(document, versions[0]) == []


def test_the_newest_three_before_are_bases(registry: RegistryFolder, versions: list[BundleOnDisk]) -> None:
    assert bases(offers(registry, 4), versions[3]) == [model(versions[v]) for v in (2, 1, 0)]
    registry.publish(versions[4])
    assert offers(registry, 5) is None


@pytest.mark.parametrize(
    ("words", "found"),
    [(("auto",), [3, 2, 1]), (("1.0.0",), [0]), (("1.0.0", "auto"), [3, 2, 1, 0])],
)
def test_bases_can_be_named(
    registry: RegistryFolder, versions: list[BundleOnDisk], words: tuple[str, ...], found: list[int]
) -> None:
    registry.publish(versions[4], *words)
    assert bases(offers(registry, 5), versions[4]) == [model(versions[v]) for v in found]


def test_every_offer_is_there_under_its_digest_and_small(
    registry: RegistryFolder, versions: list[BundleOnDisk]
) -> None:
    document = offers(registry, 4)
    assert document is not None
    for blob in document.blobs:
        for e in blob.encodings:
            data = (registry.folder / blob_path(e.sha256)).read_bytes()
            assert (sha256_hex(data), len(data)) == (e.sha256, e.size_bytes)
            assert e.base_sha256 is None or e.size_bytes < 0.7 * blob.size_bytes


def deltas(registry: RegistryFolder, reference: str, *options: str, code: int = 0) -> str:
    args = ["registry", "deltas", str(registry.folder), reference, *options, "--keys", str(registry.keys)]
    result = CliRunner().invoke(main, [*args, "--json"])
    assert result.exit_code == code, result.output
    return result.stdout


def test_patches_can_be_added_later(registry: RegistryFolder, versions: list[BundleOnDisk]) -> None:
    registry.publish(versions[4], "4.0.0")
    told = json.loads(deltas(registry, "net@5.0.0", "--from", "2.0.0", "--from", "1.0.0"))
    assert {(m["file"], m["base"]) for m in told["made"]} >= {
        ("model.onnx", "2.0.0"),
        ("model.onnx", "1.0.0"),
    }
    document = offers(registry, 5)
    assert bases(document, versions[4]) == [model(versions[v]) for v in (3, 1, 0)]
    again = json.loads(deltas(registry, "net@5.0.0", "--from", "2.0.0"))
    assert again["made"] == []
    assert offers(registry, 5) == document


def test_the_version_itself_stays_as_it_was(registry: RegistryFolder, versions: list[BundleOnDisk]) -> None:
    registry.publish(versions[4])
    before = Reader(str(registry.folder), registry.root.read_bytes()).find("net", "5.0.0")
    deltas(registry, "net@5.0.0", "--from", "4.0.0")
    assert Reader(str(registry.folder), registry.root.read_bytes()).find("net", "5.0.0") == before


@pytest.mark.parametrize(
    ("reference", "base", "code"),
    [
        ("net@9.0.0", "1.0.0", 2),
        ("net@4.0.0", "9.0.0", 2),
        ("other@1", "1.0.0", 2),
        ("net@4.0.0", "4.0.0", 2),
    ],
)
def test_what_is_not_published_has_no_deltas(
    registry: RegistryFolder, reference: str, base: str, code: int
) -> None:
    assert "not" in deltas(registry, reference, "--from", base, code=code)


def test_encodings_are_no_version(registry: RegistryFolder) -> None:
    reader = Reader(str(registry.folder), registry.root.read_bytes())
    assert [p.manifest.version for p in reader.published()] == [f"{v}.0.0" for v in range(1, 5)]


def test_what_does_not_shrink_is_not_offered(registry: RegistryFolder, tmp_path: Path) -> None:
    """Unrelated weights: a patch would be as long as the model."""
    registry.publish(weights.bundle(tmp_path, "net", 7, change=1.0), "auto")
    document = offers(registry, 7)
    assert document is not None
    model_blob = max(document.blobs, key=lambda b: b.size_bytes)
    assert {e.algorithm for e in model_blob.encodings} == {ZSTD}


@pytest.mark.parametrize("old_bytes", [0, 1, 7, 100])
def test_a_base_can_be_tiny(tmp_path: Path, old_bytes: int) -> None:
    registry = RegistryFolder.create(tmp_path / "registry")
    registry.publish(make_bundle(tmp_path, "n", "1.0.0", 1, padding_bytes=old_bytes), "auto")
    registry.publish(make_bundle(tmp_path, "n", "2.0.0", 2, padding_bytes=20_000), "1.0.0")
