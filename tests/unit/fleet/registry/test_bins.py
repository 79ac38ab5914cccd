"""Thousands of versions: metadata stays small on the wire, and python-tuf's own client finds each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import DownloadError, RepositoryError
from tuf.api.metadata import Metadata, Targets

from edge_contract.errors import BundleRejected, TransferFailed
from edge_contract.manifest import target_name
from fleet.registry import shelves
from fleet.registry.reader import Reader
from tests.support.ngclient import Client
from tests.support.registry_folder import RegistryFolder, tamper


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> RegistryFolder:
    """2,000 versions of a model."""
    made = RegistryFolder.create(tmp_path_factory.mktemp("many"))
    made.publish_many("fashion", 2000)
    return made


def client(made: RegistryFolder, state: Path) -> Client:
    return Client(made.folder, state, made.root.read_bytes())


def test_bins_grow_in_steps_and_never_shrink() -> None:
    assert [shelves.bits_for(n) for n in (0, 64, 65, 256, 257, 2000, 10_000)] == [0, 0, 2, 2, 4, 6, 8]
    assert shelves.bits_for(1, 6) == 6


def test_two_thousand_versions_take_little(many: RegistryFolder, tmp_path: Path) -> None:
    device = client(many, tmp_path / "device")
    found = device.find(target_name("fashion", "1234"))
    assert found is not None
    assert found.length == len("models/fashion/1234.json")
    assert device.fetched_bytes < 20_000, device.fetched
    top = json.loads((device.state / "targets.json").read_bytes())["signed"]
    assert list(top["targets"]) == ["operators.json"]
    # The next day, with a new timestamp and snapshot:
    many.refresh()
    assert device.find(target_name("fashion", "1234")) is not None
    assert device.fetched_bytes < 8_000, device.fetched
    assert device.find(target_name("fashion", "2001")) is None
    assert device.find(target_name("other", "1")) is None


def test_every_version_is_where_a_client_looks(many: RegistryFolder, tmp_path: Path) -> None:
    catalogue = Reader(str(many.folder), many.root.read_bytes()).catalogue
    names = {target_name("fashion", str(n)) for n in range(1, 2001)}
    assert set(catalogue.targets) == names | {"operators.json"}
    device = client(many, tmp_path / "device")
    for name in sorted(names)[::97]:
        found = device.find(name)
        assert found is not None
        assert found.hashes["sha256"] == catalogue.targets[name].sha256


def test_publishing_signs_only_the_bin_it_touches(many: RegistryFolder, tmp_path: Path) -> None:
    made = many.copy(tmp_path)
    before = {p.name for p in (made.folder / "metadata").iterdir()}
    made.publish_many("digits", 1)
    new = sorted(p.name for p in (made.folder / "metadata").iterdir() if p.name not in before)
    assert len(new) == 2, new
    assert new[0].split(".", 1)[1].startswith("models.6-")
    assert new[1].endswith(".snapshot.json")


def forged(path: Path) -> None:
    """Another content for a bin, signed by somebody: the snapshot names bins by version alone."""
    document = Metadata[Targets].from_file(str(path))
    document.signed.targets.clear()
    document.sign(CryptoSigner.generate_ed25519())
    path.write_bytes(document.to_bytes())


def older(path: Path) -> None:
    """A bin as its keys once signed it, under the name of a newer version."""
    path.write_bytes(path.with_name("1." + path.name.partition(".")[2]).read_bytes())


@pytest.mark.parametrize("alter", [forged, older, tamper, Path.unlink])
def test_an_altered_bin_is_neither_read_nor_signed_over(
    tmp_path: Path, alter: Callable[[Path], None]
) -> None:
    made = RegistryFolder.create(tmp_path)
    names = made.publish_many("fashion", 70)
    made.refresh("--also", "targets")
    path = made.folder / "metadata" / "2.models.2-0.json"
    name = next(name for name in names if name.encode() in path.read_bytes())
    alter(path)
    with pytest.raises((RepositoryError, DownloadError)):
        client(made, tmp_path / "device").find(name)
    catalogue = Reader(str(made.folder), made.root.read_bytes()).catalogue
    with pytest.raises((BundleRejected, TransferFailed)):
        catalogue.find(name)
    with pytest.raises((BundleRejected, TransferFailed)):
        _ = catalogue.targets
    with pytest.raises(BundleRejected), made.opened():
        pass


def test_a_device_follows_while_bins_appear_and_multiply(tmp_path: Path) -> None:
    made = RegistryFolder.create(tmp_path)
    device = client(made, tmp_path / "device")
    assert device.find("operators.json") is not None
    for count in (64, 65, 256, 257, 1025):
        made.publish_many("fashion", count)
        assert device.find(target_name("fashion", str(count))) is not None, count
        assert device.find(target_name("fashion", "1")) is not None
        assert device.find("operators.json") is not None
