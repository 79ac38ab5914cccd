"""The fetch child's work against a real registry: what it stores, what it says, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from edge_agent.config import Config, Registry, Update
from edge_agent.layout import Layout
from edge_agent.update import fetch
from edge_agent.update.store import Store
from edge_contract import manifest as manifests
from edge_contract import wire
from edge_contract.errors import BundleRejected, DeviceUnfit, Reason, StorageFault, TransferFailed
from edge_contract.manifest import Needs
from tests.support.http_registry import FolderServer, cut, status, whole
from tests.support.models import BundleOnDisk, make_bundle
from tests.support.registry_folder import RegistryFolder, tamper
from tests.support.small_disk import small_disk

PADDING = 200_000


class Ended(NamedTuple):
    code: int
    lines: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1]


class Bundles(NamedTuple):
    v1: BundleOnDisk
    v2: BundleOnDisk
    greedy: BundleOnDisk


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder = tmp_path_factory.mktemp("bundles")
    return Bundles(
        make_bundle(folder, seed=1, padding_bytes=PADDING),
        make_bundle(folder, version="2.0.0", release=2, seed=2, padding_bytes=PADDING),
        make_bundle(folder, name="greedy", needs=Needs(memory_bytes=1 << 40)),
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, bundles: Bundles) -> RegistryFolder:
    made = RegistryFolder.create(tmp_path_factory.mktemp("registry"))
    for bundle in bundles:
        made.publish(bundle)
    return made


@pytest.fixture
def registry(original: RegistryFolder, tmp_path: Path) -> RegistryFolder:
    return original.copy(tmp_path / "copy")


@pytest.fixture
def server(registry: RegistryFolder) -> Iterator[FolderServer]:
    with FolderServer(registry.folder) as server:
        yield server


@pytest.fixture
def config(server: FolderServer, registry: RegistryFolder, tmp_path: Path) -> Config:
    return Config(
        tenant="t",
        device="d",
        state_dir=str(tmp_path / "state"),
        registry=Registry(url=server.url, root=str(registry.root), timeout_s=1.0, retries=1),
        update=Update(disk_reserve_bytes=0),
    )


Run = Callable[..., Ended]


@pytest.fixture
def run(config: Config, capsys: pytest.CaptureFixture[str]) -> Run:
    """Fetch a bundle as the child does; returns what its parent would see."""

    def fetch_(
        bundle: BundleOnDisk,
        *,
        config: Config = config,
        digest: str = "",
        version: str = "",
        min_release: int = 0,
    ) -> Ended:
        capsys.readouterr()
        version = version or bundle.manifest.version
        code = fetch.run_fetch(config, bundle.manifest.name, version, digest or bundle.digest, min_release)
        return Ended(code, [json.loads(line) for line in capsys.readouterr().out.splitlines()])

    return fetch_


def staged(config: Config) -> list[str]:
    return sorted(p.name for p in Layout(config).staging.iterdir() if not p.name.startswith("."))


def stored(config: Config, bundle: BundleOnDisk) -> bool:
    return Store(Layout(config)).has(bundle.digest)


def assert_refused(ended: Ended, kind: type[Exception], reason: Reason) -> None:
    assert ended.code == kind.exit_code, ended.last  # type: ignore[attr-defined]
    assert (ended.last["event"], ended.last["reason"]) == ("error", reason.value)
    assert ended.last["what"]
    assert ended.last["next_step"]


def test_a_published_version_is_brought_whole_into_the_store(
    run: Run, config: Config, bundles: Bundles
) -> None:
    ended = run(bundles.v1)
    size = bundles.v1.manifest.size_bytes
    assert ended.code == 0
    assert ended.lines[0] == {"event": "resolved", "missing_bytes": size, "total_bytes": size}
    assert ended.last == {"event": "done"}
    assert stored(config, bundles.v1)
    assert staged(config) == []


def test_what_the_store_has_is_not_fetched(
    run: Run, config: Config, bundles: Bundles, server: FolderServer, registry: RegistryFolder
) -> None:
    run(bundles.v1)
    server.seen.clear()
    ended = run(bundles.v2)
    assert ended.lines[0]["missing_bytes"] == bundles.v2.manifest.size_bytes - PADDING
    assert stored(config, bundles.v2)
    padding = "/" + str(registry.blob(bundles.v2, "labels").relative_to(registry.folder))
    assert padding not in [seen.path for seen in server.seen]
    assert run(bundles.v2).lines[0]["missing_bytes"] == 0


def test_progress_counts_what_came_and_never_more(
    run: Run, config: Config, bundles: Bundles, server: FolderServer
) -> None:
    server.rate_bytes_per_s = 400_000
    lines = run(bundles.v1).lines
    done = [line["done_bytes"] for line in lines if line["event"] == "progress"]
    assert len(done) >= 2
    assert done == sorted(done)
    assert done[-1] <= lines[0]["missing_bytes"]


def test_a_download_that_was_cut_is_taken_up_again(
    run: Run, config: Config, bundles: Bundles, server: FolderServer, registry: RegistryFolder
) -> None:
    blob = registry.blob(bundles.v1, "labels")
    path = str(blob.relative_to(registry.folder))
    server.instead[path] = cut(blob.read_bytes(), 100_000)
    assert_refused(run(bundles.v1), TransferFailed, Reason.REGISTRY_UNREACHABLE)
    assert not stored(config, bundles.v1)
    assert any(name.endswith(".part") for name in staged(config))
    del server.instead[path]
    server.seen.clear()
    assert run(bundles.v1).code == 0
    assert [seen.range for seen in server.seen if seen.path == "/" + path] != [None]
    assert staged(config) == []


def test_keys_of_operators_are_kept(run: Run, config: Config, bundles: Bundles) -> None:
    assert fetch.run_trust(config) == 0
    data = (Layout(config).trust / "operators.json").read_bytes()
    assert wire.decode(data, wire.Operators).keys[0].label == "tests"


def test_a_digest_other_than_the_signed_one_is_refused(run: Run, config: Config, bundles: Bundles) -> None:
    assert_refused(run(bundles.v1, digest="0" * 64), BundleRejected, Reason.TRUST_FAILED)


def test_an_older_release_is_refused_before_its_blobs_are_fetched(
    run: Run, config: Config, bundles: Bundles, server: FolderServer
) -> None:
    ended = run(bundles.v1, min_release=2)
    assert_refused(ended, DeviceUnfit, Reason.ROLLBACK_REFUSED)
    assert "release 1" in ended.last["what"]
    assert "--allow-downgrade" in ended.last["next_step"]
    blobs = {f"/{manifests.blob_path(f.sha256)}" for f in bundles.v1.manifest.files}
    assert blobs.isdisjoint(seen.path for seen in server.seen)
    assert run(bundles.v2, min_release=2).code == 0


def test_what_is_not_published_is_looked_for_again(run: Run, config: Config, bundles: Bundles) -> None:
    assert_refused(run(bundles.v1, version="7.0.0"), TransferFailed, Reason.NOT_PUBLISHED)


def test_a_version_that_needs_more_than_this_device_has(run: Run, config: Config, bundles: Bundles) -> None:
    ended = run(bundles.greedy)
    assert_refused(ended, DeviceUnfit, Reason.MEMORY_TOO_SMALL)
    assert staged(config) == [bundles.greedy.digest]  # its manifest, and nothing more


@pytest.mark.parametrize("role", ["model", "golden", "labels", "manifest"])
def test_a_blob_that_was_tampered_with_is_refused(
    run: Run, config: Config, bundles: Bundles, registry: RegistryFolder, role: str
) -> None:
    tamper(registry.blob(bundles.v1, role))
    assert_refused(run(bundles.v1), BundleRejected, Reason.DIGEST_MISMATCH)
    assert not stored(config, bundles.v1)
    assert registry.blob(bundles.v1, role).name not in staged(config)


def test_a_blob_that_is_missing_is_looked_for_again(
    run: Run, config: Config, bundles: Bundles, registry: RegistryFolder
) -> None:
    registry.blob(bundles.v1).unlink()
    assert_refused(run(bundles.v1), TransferFailed, Reason.BLOB_MISSING)


def test_too_little_space_is_found_out_before_the_download(
    run: Run, config: Config, bundles: Bundles, server: FolderServer, registry: RegistryFolder
) -> None:
    ended = run(bundles.v1, config=replace(config, update=Update(disk_reserve_bytes=1 << 50)))
    assert_refused(ended, StorageFault, Reason.DISK_FULL)
    assert "free" in ended.last["what"]
    blobs = {f"/{manifests.blob_path(f.sha256)}" for f in bundles.v1.manifest.files}
    assert blobs.isdisjoint(seen.path for seen in server.seen)


def test_what_is_staged_already_needs_no_more_space(
    run: Run, config: Config, bundles: Bundles, server: FolderServer, registry: RegistryFolder
) -> None:
    """A device that was cut off at 99 % must not be told that there is no room for 100 % more."""
    blob = registry.blob(bundles.v1, "labels")
    server.instead[str(blob.relative_to(registry.folder))] = cut(blob.read_bytes(), PADDING - 1000)
    with small_disk(Path(config.state_dir), 400_000) as disk:
        if disk.reason is not Reason.DISK_FULL:
            return  # without a disk of its own there is no lack of space to be told
        run(bundles.v1)
        server.instead.clear()
        assert run(bundles.v1).code == 0


def test_a_disk_that_fills_up_meanwhile_ends_it_with_nothing_in_the_store(
    run: Run, config: Config, bundles: Bundles
) -> None:
    with small_disk(Path(config.state_dir), 128 << 10) as disk:
        ended = run(bundles.v1)
        assert ended.code == StorageFault.exit_code
        assert ended.last["reason"] == disk.reason.value
        assert not stored(config, bundles.v1)
        assert list(Layout(config).store.iterdir()) == []


def test_a_manifest_under_another_name_is_refused(
    run: Run, config: Config, bundles: Bundles, tmp_path: Path, server: FolderServer
) -> None:
    """Signed by somebody with the targets key, and still not what it claims to be."""
    from fleet.registry import repository, trust
    from fleet.registry.keys import Keys

    made = RegistryFolder.create(tmp_path / "confused")
    made.publish(bundles.v1)
    keys = Keys(made.keys, lambda: b"")
    with repository.opened(made.folder, keys) as repo:
        size = made.blob(bundles.v1, "manifest").stat().st_size
        repo.draft.add(manifests.target_name("other", "1.0.0"), trust.Target(size, bundles.v1.digest))
        list(repository.sign(repo, keys))
    server.folder = made.folder
    other = replace(config, registry=replace(config.registry, root=str(made.root)))
    bundle = BundleOnDisk(replace(bundles.v1.manifest, name="other"), bundles.v1.digest, bundles.v1.folder)
    ended = run(bundle, config=other)
    assert_refused(ended, BundleRejected, Reason.MANIFEST_INVALID)
    assert "calls itself tiny@1.0.0" in ended.last["what"]


@pytest.mark.parametrize("answer", [status(503), status(404), whole(b"")])
def test_a_registry_without_keys_of_operators(
    run: Run, config: Config, server: FolderServer, registry: RegistryFolder, answer: object
) -> None:
    server.instead["metadata/timestamp.json"] = answer  # type: ignore[assignment]
    assert fetch.run_trust(config) == TransferFailed.exit_code
    assert not (Layout(config).trust / "operators.json").exists()
