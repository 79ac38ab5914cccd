"""Thousands of versions: metadata stays small on the wire, and python-tuf's own client finds each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_contract.manifest import target_name
from fleet.registry import shelves
from fleet.registry.reader import Reader
from tests.support.ngclient import Client
from tests.support.registry_folder import RegistryFolder


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


def test_a_device_follows_while_bins_appear_and_multiply(tmp_path: Path) -> None:
    made = RegistryFolder.create(tmp_path)
    device = client(made, tmp_path / "device")
    assert device.find("operators.json") is not None
    for count in (64, 65, 256, 257, 1025):
        made.publish_many("fashion", count)
        assert device.find(target_name("fashion", str(count))) is not None, count
        assert device.find(target_name("fashion", "1")) is not None
        assert device.find("operators.json") is not None
