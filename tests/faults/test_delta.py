"""Encodings of blobs go wrong: the device fetches the blob whole, says so, and never serves a wrong one.

The registry is a real one over HTTP; the fetch child's work runs here, its decode children are real. Damage
on the way is found by digest. What is worse is signed by the registry itself, by mistake or malice.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from edge_agent import facts, files
from edge_agent.config import Config, Registry, Update
from edge_agent.layout import Layout
from edge_agent.update import fetch, obtain
from edge_agent.update.store import Store
from edge_contract import encodings
from edge_contract.canonical import sha256_hex
from edge_contract.encodings import LANES, ZSTD, ZSTD_PATCH, Encoding, Encodings
from edge_contract.errors import TransferFailed
from edge_contract.manifest import blob_path
from fleet.registry import repository
from fleet.registry.encode import candidates
from fleet.registry.trust import Target
from tests.faults.conftest import Cases
from tests.support import weights
from tests.support.http_registry import FolderServer, cut, status
from tests.support.models import BundleOnDisk
from tests.support.registry_folder import RegistryFolder, tamper
from tests.support.waiting import wait_for


class World(NamedTuple):
    """A registry with two versions and offers, and a device's state with the first one in its store."""

    registry: RegistryFolder
    state: Path
    v1: BundleOnDisk
    v2: BundleOnDisk


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("delta")
    v1, v2 = weights.bundle(folder, "net", 1), weights.bundle(folder, "net", 2, change=0.01)
    registry = RegistryFolder.create(folder / "registry")
    registry.publish(v1)
    registry.publish(v2, "auto")
    return World(registry, folder / "state", v1, v2)


class Outcome(NamedTuple):
    """How a fetch ended, what it told, and the bytes of blobs that crossed the network."""

    code: int
    lines: list[dict[str, Any]]
    blob_bytes: int

    @property
    def detail(self) -> str:
        return str(self.lines[-1].get("detail", ""))


class Device:
    """Fetches from one registry with a state folder of its own."""

    def __init__(self, world: World, server: FolderServer, capsys: pytest.CaptureFixture[str]) -> None:
        self.world, self.server = world, server
        self._capsys = capsys
        self._offered = offers(world.registry)
        self.config = Config(
            tenant="t",
            device="d",
            state_dir=str(world.state),
            registry=Registry(url=server.url, root=str(world.registry.root), timeout_s=2.0, retries=1),
            update=Update(disk_reserve_bytes=0),
        )

    @property
    def layout(self) -> Layout:
        return Layout(self.config)

    def fetch(self, bundle: BundleOnDisk | None = None, **update: Any) -> Outcome:
        bundle = bundle or self.world.v2
        config = msgspec.structs.replace(
            self.config, update=msgspec.structs.replace(self.config.update, **update)
        )
        self._capsys.readouterr()
        self.server.seen.clear()
        code = fetch.run_fetch(config, bundle.manifest.name, bundle.manifest.version, bundle.digest)
        lines = [json.loads(line) for line in self._capsys.readouterr().out.splitlines()]
        asked = {seen.path for seen in self.server.seen if seen.path.startswith("/blobs/")}
        blobs = {f"/{blob_path(digest)}" for digest in self.big()}
        sizes = [(self.server.folder / path.lstrip("/")) for path in asked & blobs]
        return Outcome(code, lines, sum(path.stat().st_size for path in sizes if path.exists()))

    def big(self) -> set[str]:
        """Digests of the model and of everything it is offered as."""
        sha256 = self.world.v2.manifest.file("model").sha256
        return {sha256, *(e.sha256 for e in self._offered.of(sha256))}

    def staged(self) -> list[str]:
        return [p.name for p in self.layout.staging.iterdir() if not p.name.startswith(".")]

    def assert_updated(self, outcome: Outcome) -> None:
        """The new version is in the store, whole, and nothing is left over."""
        assert outcome.code == 0, outcome
        assert Store(self.layout).has(self.world.v2.digest)
        stored = self.layout.version(self.world.v2.digest) / "model.onnx"
        assert sha256_hex(stored.read_bytes()) == self.world.v2.manifest.file("model").sha256
        assert self.staged() == []

    def assert_whole(self, outcome: Outcome, why: str) -> None:
        """The same, and the model came whole (compressed or not), for that reason."""
        self.assert_updated(outcome)
        assert outcome.blob_bytes > 0.8 * self.world.v2.manifest.file("model").size_bytes
        assert why in outcome.detail, outcome.detail
        replanned = [line["missing_bytes"] for line in outcome.lines if line["event"] == "replanned"]
        assert all(after > outcome.lines[0]["missing_bytes"] for after in replanned)


@pytest.fixture
def device(original: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Device]:
    world = World(original.registry.copy(tmp_path), tmp_path / "state", original.v1, original.v2)
    with FolderServer(world.registry.folder) as server:
        device = Device(world, server, capsys)
        if not original.state.exists():
            assert device.fetch(world.v1).code == 0
            shutil.copytree(world.state, original.state)
        elif not world.state.exists():
            shutil.copytree(original.state, world.state)
        yield device


def offers(registry: RegistryFolder) -> Encodings:
    with registry.opened() as repo:
        target = repo.draft.targets[encodings.target_name("net", "2.0.0")]
        return encodings.from_bytes(repo.path(target.sha256).read_bytes())


def patch_of(device: Device) -> Encoding:
    """The shortest way to the new model."""
    found = offers(device.world.registry).of(device.world.v2.manifest.file("model").sha256)
    return min(found, key=lambda e: e.size_bytes)


def forge(device: Device, change: Callable[[Encoding], Encoding | None]) -> None:
    """Sign other offers for the model: each goes through `change`."""
    document = offers(device.world.registry)
    blobs = [
        msgspec.structs.replace(blob, encodings=[n for e in blob.encodings if (n := change(e)) is not None])
        if blob.sha256 == device.world.v2.manifest.file("model").sha256
        else blob
        for blob in document.blobs
    ]
    sign(device, encodings.to_bytes(msgspec.structs.replace(document, blobs=blobs)))


def sign(device: Device, data: bytes) -> None:
    registry = device.world.registry
    with registry.opened() as repo:
        place(registry, data)
        repo.draft.add(encodings.target_name("net", "2.0.0"), Target(len(data), sha256_hex(data)))
        list(repository.sign(repo, registry.keyring))


def place(registry: RegistryFolder, data: bytes) -> str:
    digest = sha256_hex(data)
    path = registry.folder / blob_path(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return digest


def replaced(device: Device, data: bytes, **fields: Any) -> None:
    """Sign this content in place of every patch, and offer nothing else."""
    digest = place(device.world.registry, data)

    def change(e: Encoding) -> Encoding | None:
        if e.base_sha256 is None:
            return None
        return msgspec.structs.replace(e, sha256=digest, size_bytes=len(data), **fields)

    forge(device, change)


def test_without_a_fault_the_patch_is_a_small_part_of_the_model(device: Device, cases: Cases) -> None:
    """Else everything below would show nothing."""
    cases.add("delta: patch", "none")
    outcome = device.fetch()
    device.assert_updated(outcome)
    model = device.world.v2.manifest.file("model").size_bytes
    assert outcome.blob_bytes < 0.05 * model
    assert f"instead of {device.world.v2.manifest.size_bytes}" in outcome.detail
    assert outcome.lines[0]["event"] == "resolved"
    assert outcome.lines[0]["missing_bytes"] < 0.5 * device.world.v2.manifest.size_bytes


# --- on the way and on the server ---


def spoiled(path: Path, fault: str) -> None:
    data = path.read_bytes()
    if fault == "bit flipped":
        tamper(path)
    elif fault == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "zero-filled":
        path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    elif fault == "longer":
        path.write_bytes(data + b"more")
    elif fault == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


FAULTS = ["bit flipped", "truncated", "zero-filled", "longer", "missing"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_patch_that_is_not_what_was_signed(device: Device, fault: str, cases: Cases) -> None:
    cases.add("delta: patch on the server", fault)
    spoiled(device.world.registry.folder / blob_path(patch_of(device).sha256), fault)
    device.assert_whole(device.fetch(), "model.onnx")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_list_of_encodings_that_is_not_what_was_signed(device: Device, fault: str, cases: Cases) -> None:
    cases.add("delta: list of encodings on the server", fault)
    with device.world.registry.opened() as repo:
        target = repo.draft.targets[encodings.target_name("net", "2.0.0")]
    spoiled(device.world.registry.folder / blob_path(target.sha256), fault)
    outcome = device.fetch()
    device.assert_whole(outcome, "not by an encoding")


def test_a_patch_that_is_cut_in_the_middle_is_resumed(device: Device, cases: Cases) -> None:
    cases.add("delta: patch on the way", "connection cut")
    path = blob_path(patch_of(device).sha256)
    data = (device.world.registry.folder / path).read_bytes()
    device.server.instead[path] = cut(data, len(data) // 2)
    assert device.fetch().code == TransferFailed.exit_code
    device.server.instead.clear()
    outcome = device.fetch()
    device.assert_updated(outcome)
    ranges = [seen.range for seen in device.server.seen if seen.path == f"/{path}"]
    assert ranges == [f"bytes={len(data) // 2}-"]


def test_a_registry_that_is_away_is_waited_for(device: Device, cases: Cases) -> None:
    """No reason to ask for more bytes of it."""
    cases.add("delta: patch on the way", "503")
    device.server.instead[blob_path(patch_of(device).sha256)] = status(503)
    outcome = device.fetch()
    assert outcome.code == TransferFailed.exit_code
    assert not any(line["event"] == "replanned" for line in outcome.lines)


# --- on the device ---


@pytest.mark.parametrize("fault", ["bit flipped", "truncated", "zero-filled", "empty", "missing"])
def test_a_base_that_is_damaged_on_disk(device: Device, fault: str, cases: Cases) -> None:
    cases.add("delta: base in the store", fault)
    spoiled(device.layout.version(device.world.v1.digest) / "model.onnx", fault)
    device.assert_updated(device.fetch())
    asked = [seen.path for seen in device.server.seen]
    assert f"/{blob_path(patch_of(device).sha256)}" not in asked  # looked at before it is fetched


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20, 5 << 20])
def test_a_bound_of_memory_that_no_patch_keeps(device: Device, memory_bytes: int, cases: Cases) -> None:
    cases.add("delta: decoder", "memory bound")
    outcome = device.fetch(patch_memory_bytes=memory_bytes)
    device.assert_updated(outcome)
    assert f"/{blob_path(patch_of(device).sha256)}" not in [seen.path for seen in device.server.seen]


@pytest.mark.parametrize("reads", [[], [ZSTD], [ZSTD, ZSTD_PATCH], ["something else"]])
def test_a_decoder_that_is_missing(
    device: Device, reads: list[str], monkeypatch: pytest.MonkeyPatch, cases: Cases
) -> None:
    cases.add("delta: decoder", f"missing, reads {reads}")
    monkeypatch.setattr(facts, "encodings", lambda: reads)
    outcome = device.fetch()
    device.assert_updated(outcome)
    assert outcome.blob_bytes > 0
    assert not any(line["event"] == "replanned" for line in outcome.lines)


def test_a_decoder_that_is_killed(device: Device, monkeypatch: pytest.MonkeyPatch, cases: Cases) -> None:
    """Without memory for the interpreter itself, the child dies at once, with no word."""
    cases.add("delta: decoder", "crash")
    monkeypatch.setattr(obtain, "INTERPRETER_BYTES", (1 << 20) - patch_of(device).memory_bytes)
    monkeypatch.setattr(facts, "encodings", lambda: [LANES])
    device.assert_whole(device.fetch(), "model.onnx")


def test_a_decoder_that_hangs(device: Device, monkeypatch: pytest.MonkeyPatch, cases: Cases) -> None:
    cases.add("delta: decoder", "hang")
    monkeypatch.setattr(obtain, "_DECODE_TIMEOUT_S", 0.0)
    device.assert_whole(device.fetch(), "did not end in time")


def test_a_disk_without_room_for_an_encoded_blob_beside_the_whole(
    device: Device, monkeypatch: pytest.MonkeyPatch, cases: Cases
) -> None:
    cases.add("delta: staging", "no space for both")
    monkeypatch.setattr(facts, "encodings", lambda: [ZSTD])
    monkeypatch.setattr(files, "free_bytes", lambda _: device.world.v2.manifest.size_bytes + 20_000)
    device.assert_whole(device.fetch(), "no space for encoded blobs")


@pytest.mark.parametrize("left", ["encoded", "half a result", "whole result", "wrong result"])
def test_what_a_kill_leaves_behind(device: Device, left: str, cases: Cases) -> None:
    cases.add(f"delta: killed, {left}", "kill -9")
    staging, patch = device.layout.staging, patch_of(device)
    model = device.world.v2.blob("model").read_bytes()
    sha256 = sha256_hex(model)
    if left == "encoded":
        (staging / patch.sha256).write_bytes(
            (device.world.registry.folder / blob_path(patch.sha256)).read_bytes()
        )
    elif left == "half a result":
        (staging / f"{sha256}.decoded").write_bytes(model[:1000])
    else:
        (staging / sha256).write_bytes(model if left == "whole result" else bytes(len(model)))
    outcome = device.fetch()
    device.assert_updated(outcome)
    if left == "whole result":
        assert outcome.blob_bytes == 0


# --- signed, and wrong all the same ---


def bomb(device: Device, algorithm: str) -> bytes:
    base = device.world.v1.blob("model").read_bytes()
    found = candidates.patches(base, bytes(8 << 20))
    return next(c.data for c in found if c.algorithm == algorithm)


@pytest.mark.parametrize("algorithm", [LANES, ZSTD_PATCH])
def test_a_patch_bomb(device: Device, algorithm: str, cases: Cases) -> None:
    """It is signed, names a small result, and expands to more."""
    cases.add("delta: signed patch", f"bomb, {algorithm}")
    replaced(device, bomb(device, algorithm), algorithm=algorithm, memory_bytes=16 << 20)
    device.assert_whole(device.fetch(), "model.onnx")


@pytest.mark.parametrize("algorithm", [LANES, ZSTD_PATCH, "later-invention"])
@pytest.mark.parametrize("content", ["garbage", "zeros", "of another base", "damaged"])
def test_a_signed_patch_that_makes_something_else(
    device: Device, algorithm: str, content: str, cases: Cases
) -> None:
    cases.add("delta: signed patch", f"{content}, {algorithm}")
    good = (device.world.registry.folder / blob_path(patch_of(device).sha256)).read_bytes()
    old, new = (b.blob("model").read_bytes() for b in (device.world.v1, device.world.v2))
    data = {
        "garbage": b"EWLANES1" + bytes(range(256)),
        "zeros": bytes(1000),
        "of another base": next(candidates.patches(bytes(b ^ 255 for b in old), new)).data,
        "damaged": good[: len(good) // 2] + b"\xff" + good[len(good) // 2 + 1 :],
    }[content]
    replaced(device, data, algorithm=algorithm, memory_bytes=16 << 20)
    outcome = device.fetch()
    device.assert_whole(outcome, "" if algorithm == "later-invention" else "model.onnx")


def test_a_patch_that_needs_more_memory_than_was_signed(device: Device, cases: Cases) -> None:
    cases.add("delta: signed patch", "memory understated")
    forge(device, lambda e: msgspec.structs.replace(e, memory_bytes=1000) if e.base_sha256 else None)
    device.assert_whole(device.fetch(), "memory")


def test_encodings_of_another_version(device: Device, cases: Cases) -> None:
    cases.add("delta: signed list", "of another version")
    document = offers(device.world.registry)
    sign(device, encodings.to_bytes(msgspec.structs.replace(document, manifest_sha256="0" * 64)))
    device.assert_whole(device.fetch(), "another version")


@pytest.mark.parametrize("data", [b"{}", b"not json", b"\0" * 5000])
def test_a_signed_list_that_makes_no_sense(device: Device, data: bytes, cases: Cases) -> None:
    cases.add("delta: signed list", "makes no sense")
    sign(device, data)
    device.assert_whole(device.fetch(), "encodings")


# --- killed for real ---


@pytest.mark.thorough
@pytest.mark.parametrize("when", ["encoded arrives", "decoding", "decoded"])
def test_a_fetch_child_that_is_killed_while_it_patches(
    when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], cases: Cases
) -> None:
    """A process of its own, a model large enough to catch it in the act; its decode child dies with it."""
    cases.add(f"delta: {when}", "kill -9")
    v1, v2 = (weights.bundle(tmp_path, "net", v, change=c, features=1 << 15) for v, c in ((1, 0), (2, 0.05)))
    registry = RegistryFolder.create(tmp_path / "registry")
    registry.publish(v1)
    registry.publish(v2, "auto")
    with FolderServer(registry.folder) as server:
        device = Device(World(registry, tmp_path / "state", v1, v2), server, capsys)
        assert device.fetch(v1).code == 0
        model, patch = v2.manifest.file("model").sha256, patch_of(device).sha256
        mark = {"encoded arrives": f"{patch}.part", "decoding": f"{model}.decoded", "decoded": model}[when]
        server.rate_bytes_per_s = 400_000 if when == "encoded arrives" else 0
        process = subprocess.Popen(
            [sys.executable, "-c", _FETCH, msgspec.json.encode(device.config).decode(), v2.digest],
            stdout=subprocess.DEVNULL,
        )
        seen = wait_for(
            lambda: (device.layout.staging / mark).exists() or process.poll() is not None,
            f"{mark[:8]} in the staging folder",
            timeout_s=60,
            every_s=0.0005,
        )
        assert seen
        process.kill()
        process.wait()
        server.rate_bytes_per_s = 0
        device.assert_updated(device.fetch())


_FETCH = """
import sys
import msgspec
from edge_agent.config import Config
from edge_agent.update.fetch import run_fetch
sys.exit(run_fetch(msgspec.json.decode(sys.argv[1].encode(), type=Config), "net", "2.0.0", sys.argv[2]))
"""
