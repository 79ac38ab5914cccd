"""Metadata of a real registry: verified, expired, tampered with, rolled back, cut off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.config import Registry
from edge_agent.update.floor import Floor
from edge_agent.update.http import Client
from edge_agent.update.levels import MetadataFloor
from edge_agent.update.trust import Target, Trust, source
from edge_contract.errors import (
    DeviceUnfit,
    EdgewardError,
    Reason,
    StorageFault,
    TransferFailed,
)
from edge_contract.manifest import target_name
from edge_contract.wire import OPERATORS_TARGET
from tests.support.http_registry import FolderServer, cut, hang_up, stall, status, whole
from tests.support.models import BundleOnDisk, make_bundle
from tests.support.registry_folder import RegistryFolder, tamper
from tests.support.small_disk import small_disk


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleOnDisk:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, bundle: BundleOnDisk) -> RegistryFolder:
    made = RegistryFolder.create(tmp_path_factory.mktemp("registry"))
    made.publish(bundle)
    return made


@pytest.fixture
def registry(original: RegistryFolder, tmp_path: Path) -> RegistryFolder:
    return original.copy(tmp_path / "copy")


@pytest.fixture
def server(registry: RegistryFolder) -> Iterator[FolderServer]:
    with FolderServer(registry.folder) as server:
        yield server


def floor(folder: Path) -> Floor[MetadataFloor]:
    return Floor((folder / "one" / "metadata.floor", folder / "two" / "metadata.floor"), MetadataFloor())


@pytest.fixture
def trust(server: FolderServer, registry: RegistryFolder, tmp_path: Path) -> Callable[[], Trust]:
    """A new client on the same device, as in each child."""

    def make() -> Trust:
        config = Registry(url=server.url, root=str(registry.root), timeout_s=0.9, retries=1)
        return Trust(
            tmp_path / "device" / "metadata", source(config, Client(config)), floor(tmp_path), time.time()
        )

    return make


def refused(trust: Callable[[], Trust]) -> EdgewardError:
    with pytest.raises(EdgewardError) as fault:
        trust().refresh()
    return fault.value


def test_what_is_published_is_found_with_its_digest(
    trust: Callable[[], Trust], bundle: BundleOnDisk, registry: RegistryFolder
) -> None:
    found = trust()
    found.refresh()
    size = registry.blob(bundle, "manifest").stat().st_size
    assert found.target(target_name("tiny", "1.0.0")) == Target(size, bundle.digest)
    assert found.target(OPERATORS_TARGET) is not None
    assert found.target(target_name("tiny", "9.9.9")) is None


def test_what_is_published_later_is_found_later(
    trust: Callable[[], Trust], registry: RegistryFolder, tmp_path: Path
) -> None:
    trust().refresh()
    registry.publish(make_bundle(tmp_path, version="2.0.0", release=2, seed=2))
    again = trust()
    again.refresh()
    assert again.target(target_name("tiny", "2.0.0")) is not None


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_metadata_that_was_tampered_with_is_refused(
    trust: Callable[[], Trust], registry: RegistryFolder, role: str
) -> None:
    newest = max((registry.folder / "metadata").glob(f"*{role}.json"))
    document = json.loads(newest.read_text())
    document["signed"]["expires"] = "2099-01-01T00:00:00Z"
    newest.write_text(json.dumps(document))
    error = refused(trust)
    assert isinstance(error, TransferFailed)  # it may pass: no bundle is to blame
    assert error.reason is Reason.TRUST_FAILED


@pytest.mark.parametrize("data", [b"", b"{}", b"<html>Please log in</html>", b"\0" * 500, b"x" * 100_000])
def test_something_else_than_metadata_is_refused(
    trust: Callable[[], Trust], server: FolderServer, data: bytes
) -> None:
    server.instead["metadata/timestamp.json"] = whole(data)
    error = refused(trust)
    assert isinstance(error, TransferFailed)
    assert error.reason is Reason.TRUST_FAILED


def test_a_registry_signed_by_strangers_is_refused(
    trust: Callable[[], Trust], server: FolderServer, tmp_path: Path, bundle: BundleOnDisk
) -> None:
    stranger = RegistryFolder.create(tmp_path / "stranger")
    stranger.publish(bundle)
    server.folder = stranger.folder
    error = refused(trust)
    assert isinstance(error, TransferFailed)  # it may pass: no bundle is to blame
    assert error.reason is Reason.TRUST_FAILED


def test_older_metadata_than_seen_before_is_refused(
    trust: Callable[[], Trust], registry: RegistryFolder, server: FolderServer, tmp_path: Path
) -> None:
    older = registry.copy(tmp_path / "older")
    registry.publish(make_bundle(tmp_path, version="2.0.0", release=2, seed=2))
    trust().refresh()
    server.folder = older.folder
    error = refused(trust)
    assert isinstance(error, TransferFailed)  # it may pass: no bundle is to blame
    assert error.reason is Reason.TRUST_FAILED


def test_expired_metadata_is_waited_out(
    tmp_path: Path, trust: Callable[[], Trust], server: FolderServer, registry: RegistryFolder
) -> None:
    registry.refresh("--also", "root", "--expires-days-timestamp", "0.000001")
    time.sleep(1.1)  # expiry has a resolution of a second
    error = refused(trust)
    assert isinstance(error, TransferFailed)
    assert error.reason is Reason.TRUST_EXPIRED
    registry.refresh("--also", "root", "--expires-days-timestamp", "1")
    trust().refresh()


@pytest.mark.parametrize(
    "answer",
    [status(404), status(403), status(500), status(503), hang_up, cut(b"x" * 400, 100)],
    ids=["404", "403", "500", "503", "hang up", "cut in the middle"],
)
@pytest.mark.parametrize("file", ["timestamp.json", "1.snapshot.json"])
def test_trouble_on_the_way_is_not_the_bundles_fault(
    trust: Callable[[], Trust], server: FolderServer, original: RegistryFolder, file: str, answer: object
) -> None:
    newest = max(p.name for p in (original.folder / "metadata").glob("*.snapshot.json"))
    server.instead[f"metadata/{newest if 'snapshot' in file else file}"] = answer  # type: ignore[assignment]
    error = refused(trust)
    assert isinstance(error, TransferFailed), error
    assert error.reason is Reason.REGISTRY_UNREACHABLE
    assert server.url in error.what


def test_a_registry_that_says_nothing_is_given_up_on(
    trust: Callable[[], Trust], server: FolderServer
) -> None:
    server.instead["metadata/timestamp.json"] = stall(2.0)
    error = refused(trust)
    assert isinstance(error, TransferFailed)
    assert error.reason is Reason.REGISTRY_UNREACHABLE


def test_nobody_is_there(trust: Callable[[], Trust], server: FolderServer) -> None:
    server.stop()
    error = refused(trust)
    assert isinstance(error, TransferFailed)
    assert error.reason is Reason.REGISTRY_UNREACHABLE


def test_a_missing_or_broken_pinned_root_is_the_devices_fault(
    trust: Callable[[], Trust], registry: RegistryFolder
) -> None:
    tamper(registry.root)
    for broken in ("tampered", "empty", "missing"):
        if broken == "empty":
            registry.root.write_bytes(b"")
        if broken == "missing":
            registry.root.unlink()
        with pytest.raises(DeviceUnfit, match=str(registry.root)) as fault:
            trust()
        assert fault.value.reason is Reason.TRUST_FAILED


@pytest.mark.parametrize("damage", [b"", b"\0" * 300, b"{}"])
@pytest.mark.parametrize("file", ["timestamp.json", "snapshot.json", "targets.json", "root.json"])
def test_damaged_metadata_on_the_device_is_fetched_again(
    trust: Callable[[], Trust], tmp_path: Path, file: str, damage: bytes
) -> None:
    trust().refresh()
    (tmp_path / "device" / "metadata" / file).write_bytes(damage)
    again = trust()
    again.refresh()
    assert again.target(target_name("tiny", "1.0.0")) is not None


def test_a_full_disk_is_a_fault_of_the_disk(
    server: FolderServer, registry: RegistryFolder, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 1 << 10) as disk, pytest.raises(StorageFault) as fault:
        config = Registry(url=server.url, root=str(registry.root))
        Trust(
            disk.folder / "metadata", source(config, Client(config)), floor(tmp_path), time.time()
        ).refresh()
    assert fault.value.reason is disk.reason
