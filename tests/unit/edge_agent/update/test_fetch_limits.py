"""When the fetch child waits, what it makes room with, and whom it shows its credentials."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edge_agent import files
from edge_agent.config import Config, Registry, Update
from edge_agent.layout import Layout
from edge_agent.update import fetch, journal, window
from edge_agent.update.http import Client
from edge_agent.update.journal import Entry, Ref
from edge_agent.update.machine import State
from edge_agent.update.staging import Staging
from edge_agent.update.store import Store
from edge_contract.errors import Reason, StorageFault, TransferFailed
from tests.support.certificates import Authority
from tests.support.http_registry import FolderServer, ScriptedServer, redirect, status, whole
from tests.support.models import BundleOnDisk, make_bundle
from tests.support.registry_folder import RegistryFolder
from tests.support.small_disk import small_disk

PADDING = 300_000
GONE = "ab" * 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleOnDisk:
    return make_bundle(tmp_path_factory.mktemp("bundle"), padding_bytes=PADDING)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, bundle: BundleOnDisk) -> RegistryFolder:
    made = RegistryFolder.create(tmp_path_factory.mktemp("registry"))
    made.publish(bundle)
    return made


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
        run_dir=str(tmp_path / "run"),
        registry=Registry(url=server.url, root=str(registry.root), timeout_s=1.0, retries=1),
        update=Update(disk_reserve_bytes=0),
    )


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(bundle: BundleOnDisk, capsys: pytest.CaptureFixture[str]) -> Run:
    def fetch_(config: Config) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = fetch.run_fetch(config, bundle.manifest.name, bundle.manifest.version, bundle.digest)
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return fetch_


def blobs_asked(server: FolderServer, bundle: BundleOnDisk) -> list[str]:
    names = {f.sha256 for f in bundle.manifest.files}
    return [seen.path for seen in server.seen if Path(seen.path).name in names]


def with_registry(config: Config, **settings: Any) -> Config:
    return replace(config, registry=replace(config.registry, **settings))


def clock(offset_s: int) -> str:
    return time.strftime("%H:%M", time.gmtime(time.time() + offset_s))


# when


def test_outside_the_window_it_says_when_it_opens(
    run: Run, config: Config, server: FolderServer, bundle: BundleOnDisk
) -> None:
    closed = with_registry(config, window=f"{clock(7200)}-{clock(10800)} UTC")
    code, last = run(closed)
    assert (code, last["reason"]) == (TransferFailed.exit_code, Reason.OUTSIDE_WINDOW.value)
    assert 7100 <= last["retry_after_s"] <= 7200
    assert f"downloads wait for {closed.registry.window}" in last["what"]
    assert blobs_asked(server, bundle) == []
    assert run(with_registry(config, window=f"{clock(-60)}-{clock(3600)} UTC"))[0] == 0
    assert run(closed)[0] == 0  # nothing is missing any more


def test_a_window_that_closes_leaves_the_part(
    run: Run, config: Config, server: FolderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_s = time.monotonic()
    monkeypatch.setattr(window, "opens_in_s", lambda *_: 3600 if time.monotonic() > begun_s + 1.5 else 0)
    server.rate_bytes_per_s = 60_000
    code, last = run(with_registry(config, window="01:00-05:00"))
    assert (code, last["reason"]) == (TransferFailed.exit_code, Reason.OUTSIDE_WINDOW.value)
    (part,) = [p for p in Layout(config).staging.glob("*.part") if p.stat().st_size > 10_000]
    server.rate_bytes_per_s = 0
    monkeypatch.undo()
    have = part.stat().st_size
    assert run(config)[0] == 0
    assert f"bytes={have}-" in [seen.range for seen in server.seen]


@pytest.mark.parametrize(
    ("settings", "switch", "waits"),
    [
        ({}, False, False),
        ({}, True, False),  # small enough by default
        ({"metered_max_bytes": 1000}, False, False),
        ({"metered_max_bytes": 1000}, True, True),
        ({"metered_max_bytes": 0, "metered": "yes"}, False, True),
        ({"metered_max_bytes": 0, "metered": "no"}, True, False),
    ],
)
def test_a_metered_link(
    run: Run,
    config: Config,
    server: FolderServer,
    bundle: BundleOnDisk,
    settings: dict[str, Any],
    switch: bool,
    waits: bool,
) -> None:
    metered = Layout(config).metered
    if switch:
        metered.parent.mkdir()
        metered.touch()
    code, last = run(with_registry(config, **settings))
    if waits:
        assert (code, last["reason"]) == (TransferFailed.exit_code, Reason.METERED.value)
        assert last["retry_after_s"] == 300
        assert blobs_asked(server, bundle) == []
    else:
        assert code == 0


def test_the_deadline_ends_the_attempt_and_leaves_the_part(
    run: Run, config: Config, server: FolderServer
) -> None:
    server.rate_bytes_per_s = 60_000
    code, last = run(with_registry(config, deadline_s=1.0))
    assert (code, last["reason"]) == (TransferFailed.exit_code, Reason.DEADLINE_EXCEEDED.value)
    assert any(p.stat().st_size > 10_000 for p in Layout(config).staging.glob("*.part"))


# what it makes room with


def test_the_room_of_every_blob_is_taken_before_the_first_byte(
    run: Run, config: Config, server: FolderServer, bundle: BundleOnDisk, registry: RegistryFolder
) -> None:
    for blob in bundle.manifest.files:
        server.instead[str(registry.blob(bundle, blob.role).relative_to(registry.folder))] = status(404)
    assert run(config)[0] == TransferFailed.exit_code
    for blob in bundle.manifest.files:
        taken = (Layout(config).staging / f"{blob.sha256}.part").stat()
        assert taken.st_size == 0
        assert taken.st_blocks * 512 >= blob.size_bytes


def leave(config: Config, name: str, size_bytes: int, age_s: float = 0.0) -> Path:
    path = Layout(config).staging / name
    path.write_bytes(os.urandom(size_bytes))
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def test_parts_of_other_models_stay_until_nobody_wants_them(run: Run, config: Config) -> None:
    Store(Layout(config)).make_folders()
    young = leave(config, f"{'1' * 64}.part", 1000, age_s=3600)
    old = leave(config, f"{'2' * 64}.part", 1000, age_s=90 * 86400)
    brought = leave(config, "3" * 64, 1000)
    assert run(config)[0] == 0
    assert (young.exists(), old.exists(), brought.exists()) == (True, False, True)


def test_in_need_room_is_made_of_what_nobody_needs(run: Run, config: Config, tmp_path: Path) -> None:
    """Versions that nothing names go first, then old parts; what an update under way names stays."""
    with small_disk(Path(config.state_dir), 1_000_000) as disk:
        if disk.reason is not Reason.DISK_FULL:
            return  # without a disk of its own there is no lack of space to be told
        layout = Layout(config)
        store = Store(layout)
        store.make_folders()
        # `base` shares the model's net with what is fetched; the unneeded one has nothing of use.
        kept, unneeded = (install(store, tmp_path, n, seed=7) for n in ("kept", "unneeded"))
        base = install(store, tmp_path, "base", padding_bytes=1000)
        ref = Ref("1.0.0", kept)
        journal.save(layout, Entry(schema=1, name="kept", state=State.PROBATION, target=ref))
        part = leave(config, f"{'1' * 64}.part", 250_000)
        assert files.free_bytes(layout.staging) < PADDING
        ended = run(config)
        assert ended[0] == 0, ended[1]["what"]
        assert [store.has(digest) for digest in (kept, unneeded, base)] == [True, False, True]
        assert part.exists()
        store.collect({kept})
        lacking = files.free_bytes(layout.staging) + 1000
        Staging(layout, store).make_room([], lacking, set())
        assert (store.has(kept), part.exists()) == (True, False)
        with pytest.raises(StorageFault) as fault:
            Staging(layout, store).make_room([], 1 << 30, set())
        assert fault.value.reason is Reason.DISK_FULL
        assert store.has(kept)


def install(store: Store, folder: Path, name: str, **options: Any) -> str:
    made = make_bundle(folder, name, **({"padding_bytes": 250_000} | options))
    sources = {f.sha256: made.folder / f"blobs/sha256/{f.sha256[:2]}/{f.sha256}" for f in made.manifest.files}
    copies = {}
    for sha256, path in sources.items():
        copies[sha256] = Path(store._layout.staging / f"copy-{sha256}")
        copies[sha256].write_bytes(path.read_bytes())
    digest = store.add(made.manifest, copies)
    for path in copies.values():
        path.unlink()
    return digest


def test_a_journal_that_does_not_say_keeps_everything(config: Config, tmp_path: Path) -> None:
    layout = Layout(config)
    store = Store(layout)
    store.make_folders()
    digest = install(store, tmp_path, "kept")
    layout.journal_file("other").write_bytes(b"{")
    with pytest.raises(StorageFault):
        Staging(layout, store).make_room([], 1 << 60, set())
    assert store.has(digest)
    layout.journal_file("other").unlink()
    with pytest.raises(StorageFault):
        Staging(layout, store).make_room([], 1 << 60, set())
    assert not store.has(digest)


# whom it shows its credentials


def token(tmp_path: Path, text: str = "s3cret") -> str:
    path = tmp_path / "token"
    path.write_text(text + "\n")
    return str(path)


def test_the_token_goes_to_the_registry_with_metadata_and_blobs(
    run: Run, config: Config, server: FolderServer, tmp_path: Path
) -> None:
    assert run(with_registry(config, token_file=token(tmp_path)))[0] == 0
    assert {seen.authorization for seen in server.seen} == {"Bearer s3cret"}


def test_the_token_goes_to_no_other_host(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    other = ScriptedServer(whole(b"body"))
    other.tls = authority.issue("127.0.0.1")
    with other, ScriptedServer(redirect(f"{other.url}/there?signature=x")) as first:
        client = Client(Registry(url=first.url, token_file=token(tmp_path), tls_ca=str(authority.path)))
        assert b"".join(client.stream(f"{first.url}/here")) == b"body"
        assert [seen.authorization for seen in first.seen] == ["Bearer s3cret"]
        assert [seen.authorization for seen in other.seen] == [None]


def test_a_redirect_to_another_http_host_is_not_followed(tmp_path: Path) -> None:
    with ScriptedServer(whole(b"body")) as other, ScriptedServer(redirect(other.url)) as first:
        client = Client(Registry(url=first.url))
        with pytest.raises(TransferFailed, match="is not followed"):
            list(client.stream(first.url))
        assert other.seen == []


@pytest.mark.parametrize(
    ("url", "text", "why"),
    [
        ("http://registry.example", "s3cret", "would travel readable"),
        ("https://registry.example", "", "one line"),
        ("https://registry.example", "two\nlines", "one line"),
        ("https://registry.example", "not ascii: ä", "codec"),
    ],
)
def test_a_token_that_cannot_be_used(tmp_path: Path, url: str, text: str, why: str) -> None:
    with pytest.raises(TransferFailed, match=why) as fault:
        Client(Registry(url=url, token_file=token(tmp_path, text)))
    assert fault.value.reason is Reason.BAD_CONFIG
    assert "s3cret" not in str(fault.value)


def test_tls_files_that_cannot_be_used(tmp_path: Path) -> None:
    for settings in ({"tls_ca": str(tmp_path / "none")}, {"tls_cert": token(tmp_path)}):
        with pytest.raises(TransferFailed, match="TLS files") as fault:
            Client(Registry(url="https://registry.example", **settings))
        assert fault.value.reason is Reason.BAD_CONFIG


def test_a_client_certificate_is_shown_to_the_registry_alone(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, device = authority.issue("127.0.0.1"), authority.issue("device")
    server = ScriptedServer(whole(b"body"))
    server.tls = pair
    server.client_ca = authority.path
    with server:
        known = Registry(
            url=server.url,
            tls_ca=str(authority.path),
            tls_cert=str(device.certificate),
            tls_key=str(device.key),
        )
        assert b"".join(Client(known).stream(f"{server.url}/x")) == b"body"
        with pytest.raises(TransferFailed):
            list(Client(replace(known, tls_cert="", tls_key="")).stream(f"{server.url}/x"))
