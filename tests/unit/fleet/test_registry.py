"""The registry: made, filled, listed, renewed; tampering, kills and second versions of a version."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from edge_contract import canonical
from edge_contract.errors import BundleRejected, InputRejected, StorageFault
from edge_contract.manifest import blob_path, target_name
from fleet.registry import files, publish, repository, seen
from fleet.registry.keys import ROLES, Keys
from fleet.registry.reader import Reader
from tests.support.small_disk import small_disk
from tests.support.waiting import wait_for
from tests.unit.fleet import samples

Run = Callable[..., Result]
Refused = Callable[..., str]


def keyring(registry: Path) -> Keys:
    return Keys(registry.parent / "keys", samples.PASSWORD.encode)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def test_init_makes_encrypted_keys_that_only_their_owner_reads(registry: Path) -> None:
    folder = registry.parent / "keys"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for role in ROLES:
        path = folder / f"{role}.pem"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(TypeError, match="Password"):
            load_pem_private_key(path.read_bytes(), None)
        assert load_pem_private_key(path.read_bytes(), samples.PASSWORD.encode())
    assert (registry / "root.json").read_bytes() == (folder / "root.json").read_bytes()


def test_init_says_what_to_keep_offline(tmp_path: Path, run: Run) -> None:
    text = run("registry", "init", tmp_path / "r").stdout
    assert "Keep offline" in text
    assert f"{tmp_path}/keys/targets.pem" in text


def test_init_asks_twice_and_takes_no_empty_password(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEWARD_KEY_PASSWORD")
    monkeypatch.setattr("fleet.registry.password.sys", _Terminal)
    result = run("registry", "init", tmp_path / "a", input="one\ntwo\nthree\nthree\n")
    assert "do not match" in result.stderr
    assert load_pem_private_key((tmp_path / "keys" / "root.pem").read_bytes(), b"three")
    empty = run("registry", "init", tmp_path / "b", "--keys", tmp_path / "k", input="\n\n", code=2)
    assert "is empty" in empty.stderr
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "k").exists()


class _Terminal:
    """Stands in for the terminal that the runner does not have."""

    class stdin:
        @staticmethod
        def isatty() -> bool:
            return True


def test_without_a_terminal_the_password_is_not_waited_for(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEWARD_KEY_PASSWORD")
    line = refused("registry", "init", tmp_path / "r", code=2, reason="bad_input")
    assert "EDGEWARD_KEY_PASSWORD" in line


def test_keys_without_a_password_have_to_be_asked_for(
    tmp_path: Path, run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEWARD_KEY_PASSWORD", "")
    refused("registry", "init", tmp_path / "r", code=2, reason="bad_input")
    run("registry", "init", tmp_path / "r", "--insecure-no-password")
    assert load_pem_private_key((tmp_path / "keys" / "root.pem").read_bytes(), None)
    run("registry", "refresh", tmp_path / "r")


def test_password_from_a_file(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEWARD_KEY_PASSWORD")
    secret = tmp_path / "secret"
    secret.write_text("from a file\nsecond line\n")
    run("registry", "init", tmp_path / "r", "--password-file", secret)
    assert load_pem_private_key((tmp_path / "keys" / "root.pem").read_bytes(), b"from a file")
    run("registry", "refresh", tmp_path / "r", "--key-password-file", secret)


def test_init_overwrites_nothing_and_never_puts_keys_where_they_are_served(
    registry: Path, tmp_path: Path, refused: Refused
) -> None:
    before = tree(tmp_path)
    refused("registry", "init", registry, "--keys", tmp_path / "new", code=2, reason="bad_input")
    refused("registry", "init", tmp_path / "other", code=2, reason="bad_input")
    line = refused(
        "registry", "init", tmp_path / "x", "--keys", tmp_path / "x/keys", code=2, reason="bad_input"
    )
    assert "served to everyone" in line
    assert tree(tmp_path) == before


def test_init_puts_keys_onto_an_empty_stick(tmp_path: Path, run: Run) -> None:
    """A mount point cannot be replaced by a folder; it is filled."""
    with small_disk(tmp_path / "stick", 1 << 20) as stick:
        (stick.folder / ".edgeward.part").mkdir()  # what a kill leaves
        (stick.folder / "lost+found").mkdir()
        run("registry", "init", tmp_path / "registry", "--keys", stick.folder)
        names = {path.name for path in stick.folder.iterdir()}
        assert names == {"root.json", seen.NAME, "lost+found", *(f"{role}.pem" for role in ROLES)}
        assert stat.S_IMODE(stick.folder.stat().st_mode) == 0o700
        run("registry", "refresh", tmp_path / "registry", "--keys", stick.folder)


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("failing", ["keys", "registry"])
def test_init_makes_both_folders_or_neither(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, failing: str, empty: bool
) -> None:
    for name in ("keys", "registry"):
        if empty:
            (tmp_path / name).mkdir()
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        # The last of several: those before it are there already.
        last = target.name in ("timestamp.pem", "root.json") and target.parent == tmp_path / failing
        if target == tmp_path / failing or last:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        result = run("registry", "init", tmp_path / "registry", code=StorageFault.exit_code)
    assert len(result.stderr.strip().splitlines()) == 1
    assert tree(tmp_path) == {}
    run("registry", "init", tmp_path / "registry")
    run("registry", "refresh", tmp_path / "registry")


def test_published_versions_are_listed(published: Path, run: Run) -> None:
    listed = samples.json_of(run("registry", "list", published, "--json"))
    assert [(m["version"], m["release"], m["recipe"]) for m in listed["models"]] == [
        ("1.0.0", 1, "static_int8"),
        ("2.0.0", 2, "static_int8"),
    ]
    assert listed["models"][0]["metrics"][0]["value"] == 0.91
    table = run("registry", "list", published).stdout
    assert "raspberry-pi-4" in table
    assert listed["models"][1]["manifest_sha256"][:12] in table


def test_everything_a_device_needs_is_found_by_digest(published: Path) -> None:
    catalogue = samples.reader(published).catalogue
    target = catalogue.targets[target_name("fashion", "2.0.0")]
    data = (published / blob_path(target.sha256)).read_bytes()
    assert len(data) == target.length
    for entry in json.loads(data)["files"]:
        found = files.content(published / blob_path(entry["sha256"]))
        assert found == (entry["size_bytes"], entry["sha256"])
    operators = (published / blob_path(catalogue.targets["operators.json"].sha256)).read_bytes()
    key = keyring(published).load("operator").public_key().public_bytes_raw()
    assert json.loads(operators)["keys"][0]["public_hex"] == key.hex()


def test_the_same_bundle_again_is_a_no_op(published: Path, tmp_path: Path, run: Run) -> None:
    before = tree(published)
    again = ("registry", "publish", published, tmp_path / "bundle-1.0.0")
    told = run(*again).stdout
    assert "already" in told
    assert "deltas" not in told
    told = run(*again, "--delta-from", "2.0.0").stdout
    assert f"edge-fleet registry deltas {published} fashion@1.0.0 --from 2.0.0" in told
    assert tree(published) == before


def test_a_version_never_changes(published: Path, tmp_path: Path, refused: Refused) -> None:
    samples.bundle(tmp_path / "b", weights=b"other", version="1.0.0", release=9)
    before = tree(published)
    line = refused("registry", "publish", published, tmp_path / "b", code=2, reason="bad_input")
    assert "fashion@1.0.0 is published already with other content" in line
    assert tree(published) == before


@pytest.mark.parametrize("release", [1, 2])
def test_releases_rise(published: Path, tmp_path: Path, refused: Refused, release: int) -> None:
    samples.bundle(tmp_path / "b", version="3.0.0", release=release)
    line = refused("registry", "publish", published, tmp_path / "b", code=2, reason="rollback_refused")
    assert "release 3 or higher" in line


def test_another_model_counts_its_own_releases(published: Path, tmp_path: Path, run: Run) -> None:
    samples.bundle(tmp_path / "b", name="digits", version="1.0.0", release=1)
    run("registry", "publish", published, tmp_path / "b")


def test_wrong_blob_missing_blob_edited_manifest(registry: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "b"
    made = samples.bundle(folder)
    before = tree(registry)
    blob = folder / blob_path(made.files[0].sha256)
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1] + b"?")
    line = refused("registry", "publish", registry, folder, code=4, reason="digest_mismatch")
    assert "model.onnx" in line
    blob.write_bytes(whole[:-1])
    refused("registry", "publish", registry, folder, code=4, reason="digest_mismatch")
    blob.unlink()
    refused("registry", "publish", registry, folder, code=4, reason="blob_missing")
    blob.write_bytes(whole)
    manifest = folder / "manifest.json"
    edit(manifest, b'"release":1', b'"release": 1')
    line = refused("registry", "publish", registry, folder, code=4, reason="manifest_invalid")
    assert "canonical" in line
    edit(manifest, b'"release": 1', b'"releases":1')
    refused("registry", "publish", registry, folder, code=4, reason="manifest_invalid")
    manifest.unlink()
    refused("registry", "publish", registry, folder, code=2, reason="bad_input")
    assert tree(registry) == before


def test_the_folder_above_a_bundle_is_named(registry: Path, tmp_path: Path, refused: Refused) -> None:
    publish = ("registry", "publish", registry, tmp_path / "built")
    line = refused(*publish, code=2, reason="bad_input")
    assert "name the folder `bundle` below" in line
    samples.bundle(tmp_path / "built" / "bundle")
    assert refused(*publish, code=2, reason="bad_input").endswith(f"name {tmp_path}/built/bundle\n")


def test_a_source_that_changes_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"new bytes")
    expected = files.Content(3, canonical.sha256_hex(b"old"))
    with pytest.raises(BundleRejected, match="changed while"):
        files.copy(source, tmp_path / "out", expected)
    assert tree(tmp_path) == {"source": b"new bytes"}


def test_a_damaged_blob_in_the_registry_is_replaced(published: Path, tmp_path: Path, run: Run) -> None:
    made = samples.bundle(tmp_path / "b", version="3.0.0", release=3)
    path = published / blob_path(made.files[1].sha256)
    path.write_bytes(b"rotten")
    run("registry", "publish", published, tmp_path / "b")
    assert path.read_bytes() == b"golden"


def test_a_kill_between_any_two_steps_leaves_a_valid_registry(
    published: Path, tmp_path: Path, run: Run
) -> None:
    samples.bundle(tmp_path / "b", weights=b"three", version="3.0.0", release=3)
    bundle = publish.load(tmp_path / "b")
    pinned = keyring(published).pinned_root()
    total = 7  # three blobs, manifest, targets, snapshot, timestamp
    for done in range(total + 1):
        copy = tmp_path / f"after-{done}" / "registry"
        shutil.copytree(published, copy)
        shutil.copytree(published.parent / "keys", copy.parent / "keys")
        with repository.opened(copy, keyring(copy)) as repo:
            steps = publish.steps(repo, bundle, keyring(copy))
            for _ in range(done):
                next(steps)
            steps.close()
        versions = [p.manifest.version for p in Reader(str(copy), pinned).published()]
        assert versions == (["1.0.0", "2.0.0"] if done < total else ["1.0.0", "2.0.0", "3.0.0"])
        run("registry", "publish", copy, tmp_path / "b")
        versions = [p.manifest.version for p in Reader(str(copy), pinned).published()]
        assert versions == ["1.0.0", "2.0.0", "3.0.0"]


def test_each_timestamp_says_when_it_was_signed(published: Path, run: Run) -> None:
    """Devices whose clock is behind take it for the time, so no signature may carry an older one on."""
    path = published / "metadata" / "timestamp.json"
    edit(path, b"x-edgeward-signed-at", b"x-edgeward-signed-At")
    with pytest.raises(BundleRejected):
        samples.reader(published)  # it is signed
    edit(path, b"x-edgeward-signed-At", b"x-edgeward-signed-at")
    first = json.loads(path.read_bytes())["signed"]["x-edgeward-signed-at"]
    wait_for(lambda: int(time.time()) > first, "the next second")
    run("registry", "refresh", published)
    second = json.loads(path.read_bytes())["signed"]["x-edgeward-signed-at"]
    assert isinstance(second, int)
    assert first < second <= time.time()


def test_two_writers_do_not_mix(registry: Path, tmp_path: Path, refused: Refused) -> None:
    samples.bundle(tmp_path / "b")
    with repository.opened(registry, keyring(registry)):
        line = refused("registry", "publish", registry, tmp_path / "b", code=2, reason="bad_input")
    assert "another edge-fleet" in line


@pytest.mark.parametrize("name", ["timestamp.json", "3.snapshot.json", "3.targets.json"])
def test_tampered_metadata_is_neither_read_nor_signed_over(
    published: Path, tmp_path: Path, refused: Refused, name: str
) -> None:
    edit(published / "metadata" / name, b'"version":3', b'"version":4')
    samples.bundle(tmp_path / "b", version="3.0.0", release=3)
    before = tree(published)
    refused("registry", "list", published, code=4, reason="trust_failed")
    refused("registry", "publish", published, tmp_path / "b", code=4, reason="trust_failed")
    refused("registry", "refresh", published, code=4, reason="trust_failed")
    assert tree(published) == before


def test_metadata_that_is_no_metadata(published: Path, refused: Refused) -> None:
    for junk in (b"", b"{}", b'{"signed": {"_type": "timestamp"}, "signatures": []}'):
        (published / "metadata" / "timestamp.json").write_bytes(junk)
        refused("registry", "list", published, code=4, reason="trust_failed")
        refused("registry", "refresh", published, code=4, reason="trust_failed")


def test_a_registry_with_another_root_is_not_signed_over(
    published: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    """Whoever can write the served folder must not get the real keys to sign for him."""
    run("registry", "init", tmp_path / "evil", "--keys", tmp_path / "evil-keys")
    samples.bundle(tmp_path / "b", version="3.0.0", release=3)
    keys = published.parent / "keys"
    line = refused(
        "registry",
        "publish",
        tmp_path / "evil",
        tmp_path / "b",
        "--keys",
        keys,
        code=4,
        reason="trust_failed",
    )
    assert "pinned root" in line
    root = keys / "root.json"
    refused("registry", "list", tmp_path / "evil", "--root", root, code=4, reason="trust_failed")


def test_keys_of_another_registry_sign_nothing(
    published: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    run("registry", "init", tmp_path / "other", "--keys", tmp_path / "other-keys")
    (tmp_path / "other-keys" / "root.json").write_bytes(keyring(published).pinned_root())
    before = tree(published)
    refused(
        "registry", "refresh", published, "--keys", tmp_path / "other-keys", code=2, reason="trust_failed"
    )
    assert tree(published) == before


def test_a_damaged_manifest_blob_is_named(published: Path, tmp_path: Path, refused: Refused) -> None:
    sha256 = samples.reader(published).find("fashion", "1.0.0")
    (published / blob_path(sha256)).write_bytes(b"{}")
    refused("registry", "list", published, code=4, reason="digest_mismatch")
    samples.bundle(tmp_path / "b", version="3.0.0", release=3)
    refused("registry", "publish", published, tmp_path / "b", code=4, reason="digest_mismatch")
    (published / blob_path(sha256)).unlink()
    refused("registry", "list", published, code=5, reason="blob_missing")


def test_expired_metadata_is_refused_and_refresh_brings_it_back(
    tmp_path: Path, run: Run, refused: Refused
) -> None:
    folder = tmp_path / "r"
    run("registry", "init", folder, "--expires-days-timestamp", "0.00001")
    _await_expiry(folder)
    line = refused("registry", "list", folder, code=5, reason="trust_expired")
    assert "registry refresh" in line
    run("registry", "refresh", folder, "--also", "root", "--expires-days-timestamp", "1")
    run("registry", "list", folder)
    # The root keeps it: the next refresh needs no option.
    run("registry", "refresh", folder)
    run("registry", "list", folder)


def _await_expiry(folder: Path) -> None:
    expires = json.loads((folder / "metadata" / "timestamp.json").read_bytes())["signed"]["expires"]
    while time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) <= expires:
        time.sleep(0.05)


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_the_date_is_that_of_what_expires_first(published: Path, run: Run, tmp_path: Path, role: str) -> None:
    days = {"root": 400, "targets": 90, "snapshot": 60, "timestamp": 60} | {role: 5}
    options = [word for name, n in days.items() for word in (f"--expires-days-{name}", n)]
    run("registry", "refresh", published, "--also", "root", "--also", "targets", *options)
    listed = samples.json_of(run("registry", "list", published, "--json"))
    stick = ("registry", "export", published, "fashion@1.0.0", "-o")
    exported = samples.json_of(run(*stick, tmp_path / "stick.tar", "--json"))
    for told in (listed, exported):
        left = datetime.fromisoformat(told["expires"]) - datetime.now(UTC)
        assert (told["expires_first"], round(left / timedelta(days=1))) == (role, 5)
    assert f"UTC: then {role} expires" in run("registry", "list", published).stdout
    assert f"its {role} metadata expires" in run(*stick, tmp_path / "again.tar").stdout


def test_refresh_signs_what_it_was_asked_for(published: Path, run: Run) -> None:
    signed = samples.json_of(run("registry", "refresh", published, "--json"))["signed"]
    assert signed == ["snapshot", "timestamp"]
    run("registry", "refresh", published, "--also", "root", "--also", "targets")
    # The old pin still leads to the new root, which devices to come may pin.
    assert len(samples.reader(published).published()) == 2
    assert json.loads((published / "root.json").read_bytes())["signed"]["version"] == 2
    usage = run("registry", "refresh", published, "--expires-days-root", "1", code=2)
    assert "--also root" in usage.stderr


def test_refresh_needs_no_offline_key(published: Path, run: Run, refused: Refused) -> None:
    for role in ("root", "targets", "operator"):
        (published.parent / "keys" / f"{role}.pem").unlink()
    run("registry", "refresh", published)
    line = refused("registry", "refresh", published, "--also", "targets", code=2, reason="bad_input")
    assert "targets.pem" in line


def test_wrong_password_signs_nothing(
    published: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples.bundle(tmp_path / "b", version="3.0.0", release=3)
    before = tree(published)
    monkeypatch.setenv("EDGEWARD_KEY_PASSWORD", "wrong")
    line = refused("registry", "publish", published, tmp_path / "b", code=2, reason="bad_input")
    assert "wrong password" in line
    assert tree(published) == before


def test_folders_without_a_registry(tmp_path: Path, registry: Path, refused: Refused) -> None:
    samples.bundle(tmp_path / "b")
    keys = registry.parent / "keys"
    for folder in (tmp_path / "nothing", tmp_path / "b"):
        refused("registry", "list", folder, code=2, reason="bad_input")
        refused("registry", "refresh", folder, "--keys", keys, code=2, reason="bad_input")
        refused("registry", "publish", folder, tmp_path / "b", "--keys", keys, code=2, reason="bad_input")
        refused("registry", "serve", folder, code=2, reason="bad_input")
    refused("registry", "publish", registry, tmp_path / "nothing", code=2, reason="bad_input")


def test_an_unknown_version_is_answered_with_those_there_are(published: Path) -> None:
    reader = samples.reader(published)
    with pytest.raises(InputRejected, match=r"fashion@9 is not in .*; it has 1\.0\.0, 2\.0\.0"):
        reader.find("fashion", "9")
    with pytest.raises(InputRejected, match="no version of this model"):
        reader.find("digits", "1.0.0")


def test_a_url_needs_a_pinned_root_and_a_server(published: Path, refused: Refused) -> None:
    refused("registry", "list", "http://127.0.0.1:9", code=2, reason="bad_input")
    root = published / "root.json"
    refused("registry", "list", "http://127.0.0.1:9", "--root", root, code=5, reason="registry_unreachable")


def test_errors_as_json(tmp_path: Path, run: Run) -> None:
    error = samples.json_of(run("registry", "list", tmp_path / "none", "--json", code=2))["error"]
    assert error["reason"] == "bad_input"
    assert "registry init" in error["next_step"]
