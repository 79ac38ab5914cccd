"""`edge-agent import` from real media that edge-fleet wrote, whole and broken, with no network at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from edge_agent.config import Config, Registry, Update
from edge_agent.layout import Layout
from edge_agent.update import fetch, importing
from edge_agent.update.inbox import Inbox
from edge_agent.update.store import Store
from edge_contract import canonical, dsse, wire
from edge_contract.errors import (
    BundleRejected,
    DeviceUnfit,
    EdgewardError,
    InputRejected,
    MessageRejected,
    Reason,
    StorageFault,
    TransferFailed,
)
from edge_contract.manifest import Needs, blob_path
from tests.support.broker import free_port
from tests.support.models import BundleOnDisk, make_bundle
from tests.support.registry_folder import RegistryFolder, tamper


class World(NamedTuple):
    registry: RegistryFolder
    v1: BundleOnDisk
    v2: BundleOnDisk
    greedy: BundleOnDisk


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("bundles")
    bundles = (
        make_bundle(folder, seed=1, padding_bytes=200_000),
        make_bundle(folder, version="2.0.0", release=2, seed=2, padding_bytes=200_000),
        make_bundle(folder, name="greedy", needs=Needs(memory_bytes=1 << 40)),
    )
    registry = RegistryFolder.create(tmp_path_factory.mktemp("registry"))
    for bundle in bundles:
        registry.publish(bundle)
    return World(registry, *bundles)


@pytest.fixture
def config(world: World, tmp_path: Path) -> Config:
    nobody = f"http://127.0.0.1:{free_port()}"
    return Config(
        tenant="default",
        device="box-1",
        state_dir=str(tmp_path / "state"),
        registry=Registry(url=nobody, root=str(world.registry.root), timeout_s=1.0, retries=1),
        update=Update(disk_reserve_bytes=0),
    )


def import_(config: Config, medium: Path, *references: str) -> importing.Imported:
    return importing.run(config, medium, references, lambda _done, _total: None)


def refusal(config: Config, medium: Path, *references: str) -> EdgewardError:
    with pytest.raises(EdgewardError) as error:
        import_(config, medium, *references)
    assert not (Layout(config).inbox / "desired.json").exists()
    return error.value


def fetched(config: Config, bundle: BundleOnDisk, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    capsys.readouterr()
    code = fetch.run_fetch(config, bundle.manifest.name, bundle.manifest.version, bundle.digest)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name", ["stick.tar", "stick.zip", "stick"])
def test_what_was_imported_is_installed_without_a_network(
    world: World, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert fetched(config, world.v1, capsys)[0] == TransferFailed.exit_code
    done = import_(config, world.registry.export(tmp_path / name, world.v1, world.v2))
    assert done.versions == ["tiny@1.0.0", "tiny@2.0.0"]
    assert done.generation is None
    for bundle in (world.v1, world.v2):
        assert fetched(config, bundle, capsys) == (0, {"event": "done"})
        assert Store(Layout(config)).has(bundle.digest)
    again = import_(config, tmp_path / name)
    assert (again.versions, again.copied_bytes) == (done.versions, 0)


def test_a_copy_of_the_whole_registry_will_do(world: World, config: Config) -> None:
    assert "MODEL@VERSION" in refusal(config, world.registry.folder).next_step
    assert import_(config, world.registry.folder, "tiny@1.0.0").versions == ["tiny@1.0.0"]
    assert refusal(config, world.registry.folder, "tiny@9.0.0").reason is Reason.NOT_PUBLISHED
    assert refusal(config, world.registry.folder, "tiny").exit_code == InputRejected.exit_code


def test_a_version_for_other_devices_is_passed_over(world: World, config: Config, tmp_path: Path) -> None:
    done = import_(config, world.registry.export(tmp_path / "stick.tar", world.greedy, world.v1))
    assert done.versions == ["tiny@1.0.0"]
    assert set(done.unfit) == {"greedy@1.0.0"}
    error = refusal(config, world.registry.export(tmp_path / "other.tar", world.greedy))
    assert isinstance(error, DeviceUnfit)


def test_an_order_is_handed_over(world: World, config: Config, tmp_path: Path) -> None:
    options = ("--desire", "box-1", "--desire", "box-2", "--generation", "7")
    medium = world.registry.export(tmp_path / "stick.zip", world.v1, options=options)
    assert import_(config, medium).generation == 7
    inbox = Inbox(Layout(config))
    arrived = inbox.look()
    assert arrived is not None
    assert json.loads(arrived.desired)["payloadType"] == wire.DESIRED_TYPE
    inbox.done(arrived)
    assert inbox.look() is None


@pytest.mark.parametrize("name", ["stick.tar", "stick.zip", "stick"])
def test_a_stick_with_orders_for_others_says_so(
    world: World, config: Config, tmp_path: Path, name: str
) -> None:
    medium = world.registry.export(tmp_path / name, world.v1, options=("--desire", "box-2", "--desire", "a"))
    error = refusal(config, medium)
    assert (type(error), error.reason) == (MessageRejected, Reason.WRONG_AUDIENCE)
    assert "orders for a, box-2, none for this device, box-1; tiny@1.0.0 came" in error.what
    assert (Layout(config).staging / world.v1.digest).exists()


@pytest.mark.parametrize("of", ["another tenant", "a stranger", "the past"])
def test_an_order_that_the_broker_could_not_give_either(
    world: World, config: Config, tmp_path: Path, of: str
) -> None:
    medium = world.registry.export(tmp_path / "stick", world.v1)
    now_ms = time.time_ns() // 1_000_000
    past = of == "the past"
    order = wire.Desired(
        1, "else" if of == "another tenant" else "default", "box-1", 1, 1, 1 if past else now_ms + 10_000, []
    )
    key = Ed25519PrivateKey.generate() if of == "a stranger" else world.registry.operator_key
    (medium / "desired").mkdir()
    envelope = dsse.sign(canonical.to_bytes(order), wire.DESIRED_TYPE, [key])
    (medium / "desired" / "box-1.json").write_bytes(envelope)
    assert isinstance(refusal(config, medium), MessageRejected)


@pytest.mark.parametrize("role", ["model", "manifest", "labels"])
def test_a_blob_that_was_altered_is_refused(world: World, config: Config, tmp_path: Path, role: str) -> None:
    medium = world.registry.export(tmp_path / "stick", world.v1)
    sha256 = world.registry.blob(world.v1, role).name
    tamper(medium / blob_path(sha256))
    error = refusal(config, medium)
    assert (type(error), error.reason) == (BundleRejected, Reason.DIGEST_MISMATCH)
    assert not (Layout(config).staging / sha256).exists()


def test_a_blob_that_is_missing_or_cut_off(world: World, config: Config, tmp_path: Path) -> None:
    medium = world.registry.export(tmp_path / "stick", world.v1)
    path = medium / blob_path(world.registry.blob(world.v1, "labels").name)
    path.write_bytes(path.read_bytes()[:-1])
    assert isinstance(refusal(config, medium), BundleRejected)
    path.unlink()
    assert refusal(config, medium).reason is Reason.BLOB_MISSING
    path.symlink_to("/etc/hostname")  # leads out of the medium: not read
    assert refusal(config, medium).reason is Reason.BLOB_MISSING


def test_metadata_of_another_registry_is_refused(world: World, config: Config, tmp_path: Path) -> None:
    other = RegistryFolder.create(tmp_path / "other")
    other.publish(world.v1)
    error = refusal(config, other.export(tmp_path / "stick.tar", world.v1))
    assert error.reason is Reason.TRUST_FAILED


def test_expired_metadata_is_refused(world: World, config: Config, tmp_path: Path) -> None:
    copy = world.registry.copy(tmp_path / "copy")
    copy.refresh("--also", "root", "--expires-days-timestamp", str(3 / 86400))
    medium = copy.export(tmp_path / "stick.tar", world.v1)
    time.sleep(3.1)
    assert refusal(config, medium).reason is Reason.TRUST_EXPIRED


def test_an_older_medium_is_refused_after_a_newer_one(world: World, config: Config, tmp_path: Path) -> None:
    """What was verified from a medium holds against replay, as what came from the registry does."""
    old = world.registry.export(tmp_path / "old.tar", world.v1)
    copy = world.registry.copy(tmp_path / "copy")
    copy.refresh()
    import_(config, copy.export(tmp_path / "new.tar", world.v1))
    assert refusal(config, old).reason is Reason.TRUST_FAILED


def broken(kind: str, whole: Path) -> Path:
    path = whole.with_name(f"broken-{kind}")
    data = whole.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "compressed":
        path.write_bytes(gzip.compress(data))
    elif kind == "noise":
        path.write_bytes(os.urandom(100_000))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no list":
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("else"))
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("contents.json", b'["tiny@1.0.0"]')
            archive.writestr("metadata/timestamp.json", bytes(300 << 20))
    elif kind == "missing":
        pass
    return path


@pytest.mark.parametrize("kind", ["cut", "compressed", "noise", "empty", "no list", "bomb", "missing"])
def test_what_is_no_medium_is_said_in_one_line(
    world: World, config: Config, tmp_path: Path, kind: str
) -> None:
    whole = world.registry.export(tmp_path / "stick.tar", world.v1)
    error = refusal(config, broken(kind, whole))
    assert error.exit_code in (InputRejected.exit_code, TransferFailed.exit_code, BundleRejected.exit_code)


def test_names_that_lead_out_of_an_archive_lead_nowhere(world: World, config: Config, tmp_path: Path) -> None:
    whole = world.registry.export(tmp_path / "stick.tar", world.v1)
    with tarfile.open(whole, "a") as archive:
        for name in ("../../escaped", "/tmp/escaped", "metadata/../../escaped"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
    before = {p for p in tmp_path.rglob("*") if p.name == "escaped"}
    import_(config, whole)
    assert {p for p in tmp_path.rglob("*") if p.name == "escaped"} == before == set()


def test_no_room(world: World, config: Config, tmp_path: Path) -> None:
    greedy = replace(config, update=Update(disk_reserve_bytes=1 << 60))
    error = refusal(greedy, world.registry.export(tmp_path / "stick.tar", world.v1))
    assert (type(error), error.reason) == (StorageFault, Reason.DISK_FULL)


def test_another_user_is_told_to_be_the_agent(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(config.state_dir).mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    error = refusal(config, world.registry.export(tmp_path / "stick.tar", world.v1))
    assert "sudo -u" in error.next_step


def test_a_download_of_hours_keeps_no_import_waiting(world: World, config: Config, tmp_path: Path) -> None:
    from edge_agent.update.staging import Staging

    layout = Layout(config)
    store = Store(layout)
    store.make_folders()
    medium = world.registry.export(tmp_path / "stick.tar", world.v1)
    with Staging(layout, store).alone():
        assert import_(config, medium).versions == ["tiny@1.0.0"]


def test_the_command(
    world: World, config: Config, tmp_path: Path, write_config: Callable[[Config], Path]
) -> None:
    medium = world.registry.export(tmp_path / "stick.tar", world.v1)
    command = [sys.executable, "-m", "edge_agent", "import", "--config", str(write_config(config))]
    done = subprocess.run([*command, str(medium), "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"] == ["tiny@1.0.0"]
    shutil.copy(medium, tmp_path / "cut.tar")
    os.truncate(tmp_path / "cut.tar", 10_000)
    done = subprocess.run([*command, str(tmp_path / "cut.tar")], capture_output=True, text=True, timeout=60)
    assert done.returncode in (2, 4, 5)
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[Config], Path]:
    def write(config: Config) -> Path:
        path = tmp_path / "agent.toml"
        path.write_text(
            f'tenant = "{config.tenant}"\ndevice = "{config.device}"\nstate_dir = "{config.state_dir}"\n'
            f'[registry]\nurl = "{config.registry.url}"\nroot = "{config.registry.root}"\n'
            f"[update]\ndisk_reserve_bytes = 0\n"
        )
        return path

    return write
