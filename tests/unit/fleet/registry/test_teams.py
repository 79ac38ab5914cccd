"""Delegation of models to teams, and taking back: what python-tuf's own client finds, and what not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from edge_contract import encodings
from edge_contract.manifest import target_name
from tests.support.ngclient import Client
from tests.support.registry_folder import RegistryFolder
from tests.unit.fleet import samples

Run = Callable[..., Result]
Refused = Callable[..., str]


@pytest.fixture
def device(published: Path, tmp_path: Path) -> Client:
    """It knows the registry with fashion 1.0.0 and 2.0.0 before anything is delegated."""
    made = Client(published, tmp_path / "device", (published.parent / "keys" / "root.json").read_bytes())
    assert made.find(target_name("fashion", "2.0.0")) is not None
    return made


@pytest.fixture
def team(published: Path, tmp_path: Path, run: Run) -> Path:
    """Vision has fashion and cam-*; the folder holds its key, the online keys, the pinned root, no more."""
    run("registry", "delegate", published, "fashion", "--team", "vision")
    run("registry", "delegate", published, "cam-*", "--team", "vision")
    folder = tmp_path / "team-keys"
    folder.mkdir()
    keys = tmp_path / "keys"
    (keys / "team-vision.pem").rename(folder / "team-vision.pem")
    for name in ("snapshot.pem", "timestamp.pem", "root.json"):
        (folder / name).write_bytes((keys / name).read_bytes())
    return folder


def publish(
    run: Callable[..., object], registry: Path, tmp_path: Path, keys: Path, **changes: object
) -> object:
    bundle = tmp_path / f"bundle-{changes['name']}-{changes['version']}"
    samples.bundle(bundle, weights=repr(changes).encode(), **changes)
    code = changes.get("code", 0)
    return run("registry", "publish", registry, bundle, "--keys", keys, code=code)


def test_a_team_publishes_its_models_with_its_own_key(
    published: Path, team: Path, device: Client, tmp_path: Path, run: Run
) -> None:
    publish(run, published, tmp_path, team, name="fashion", version="3.0.0", release=3)
    publish(run, published, tmp_path, team, name="cam-1", version="1.0.0", release=1)
    for name, version in (("fashion", "1.0.0"), ("fashion", "3.0.0"), ("cam-1", "1.0.0")):
        assert device.find(target_name(name, version)) is not None, (name, version)
    listed = samples.json_of(run("registry", "list", published, "--json"))["models"]
    assert {(m["name"], m["version"], m["team"]) for m in listed} == {
        ("fashion", "1.0.0", "vision"),
        ("fashion", "2.0.0", "vision"),
        ("fashion", "3.0.0", "vision"),
        ("cam-1", "1.0.0", "vision"),
    }


def test_a_team_publishes_nothing_else(published: Path, team: Path, tmp_path: Path, refused: Refused) -> None:
    samples.bundle(tmp_path / "b", name="digits")
    before = sorted((published / "metadata").iterdir())
    refused("registry", "publish", published, tmp_path / "b", "--keys", team, code=2, reason="bad_input")
    assert sorted((published / "metadata").iterdir()) == before


def test_the_targets_key_no_longer_publishes_what_is_delegated(
    published: Path, team: Path, tmp_path: Path, refused: Refused
) -> None:
    samples.bundle(tmp_path / "b", version="3.0.0", release=3)
    line = refused("registry", "publish", published, tmp_path / "b", code=2, reason="bad_input")
    assert "team-vision.pem" in line


def test_what_a_team_signs_outside_its_models_is_not_found(
    published: Path, team: Path, device: Client, tmp_path: Path, run: Run
) -> None:
    """Signed by the team's valid key, in the team's valid metadata, and still nobody's version."""
    publish(run, published, tmp_path, tmp_path / "keys", name="digits", version="1.0.0", release=1)
    made = RegistryFolder(tmp_path)
    from edge_contract.canonical import sha256_hex
    from fleet.registry import repository, signing, trust
    from fleet.registry.keys import Keys

    keys = Keys([team, tmp_path / "keys"], samples.PASSWORD.encode)
    with repository.opened(made.folder, keys) as repo:
        role = repo.draft.tree.role("team-vision", "targets")
        evil = trust.Target(4, sha256_hex(b"evil"))
        for name in ("models/digits/1.0.0.json", "models/digits/9.json", "operators.json"):
            role.targets[name] = signing.entry(name, evil)
        repo.draft.change({"team-vision"})
        list(repository.sign(repo, keys))
    for name in ("models/digits/1.0.0.json", "operators.json"):
        found = device.find(name)
        assert found is not None
        assert found.hashes["sha256"] != evil.sha256
    assert device.find("models/digits/9.json") is None
    targets = samples.reader(published).catalogue.targets
    assert "models/digits/9.json" not in targets
    assert evil not in targets.values()


def test_a_team_that_keeps_its_key_to_itself(
    published: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    theirs, keys = tmp_path / "theirs", tmp_path / "keys"
    for name in ("team-audio", "spare"):
        run("registry", "keys", "new", name, "--keys", theirs)
    named = ("--team", "audio", "--key", theirs / "team-audio.pub")
    run("registry", "delegate", published, "voice", *named)
    assert not list(keys.glob("team-*"))
    both = ("--keys", theirs, "--keys", keys)
    samples.bundle(tmp_path / "v", name="voice")
    run("registry", "publish", published, tmp_path / "v", *both)
    device = Client(published, tmp_path / "device", (keys / "root.json").read_bytes())
    assert device.find(target_name("voice", "1.0.0")) is not None
    # Whatever is published already has to be signed by the team, so its key is needed.
    line = refused(
        "registry", "delegate", published, "fashion", "--team", "audio", code=2, reason="trust_failed"
    )
    assert "2 versions" in line
    refused("registry", "delegate", published, "x", "--team", "audio", *named[2:], code=2, reason="bad_input")
    run("registry", "delegate", published, "fashion", "--team", "audio", *both)
    assert device.find(target_name("fashion", "2.0.0")) is not None


def test_thresholds_and_rotation_of_a_team(published: Path, device: Client, tmp_path: Path, run: Run) -> None:
    run("registry", "delegate", published, "fashion", "--team", "vision", "--count", "3", "--threshold", "2")
    before = {p.name for p in (tmp_path / "keys").glob("team-vision*.pem")}
    assert len(before) == 3
    run("registry", "keys", "rotate", published, "team-vision")
    publish(run, published, tmp_path, tmp_path / "keys", name="fashion", version="3.0.0", release=3)
    assert device.find(target_name("fashion", "3.0.0")) is not None
    run("registry", "keys", "rotate", published, "targets")
    run("registry", "refresh", published, "--also", "team-vision", "--also", "targets")
    assert device.find(target_name("fashion", "1.0.0")) is not None


def test_a_revoked_version_is_gone_and_never_comes_back(
    published: Path, device: Client, tmp_path: Path, run: Run, refused: Refused
) -> None:
    text = run("registry", "revoke", published, "fashion@2.0.0").stdout
    assert "goes on until another version is deployed" in text
    assert device.find(target_name("fashion", "2.0.0")) is None
    assert device.find(target_name("fashion", "1.0.0")) is not None
    assert [p.manifest.version for p in samples.reader(published).published()] == ["1.0.0"]
    again = ("registry", "publish", published, tmp_path / "bundle-2.0.0")
    assert "never comes back" in refused(*again, code=2, reason="bad_input")
    samples.bundle(tmp_path / "b", version="2.0.1", release=2)
    line = refused("registry", "publish", published, tmp_path / "b", code=2, reason="rollback_refused")
    assert "release 3 or higher" in line
    refused("registry", "revoke", published, "fashion@2.0.0", code=2, reason="not_published")


def test_revoking_a_team(
    published: Path, team: Path, device: Client, tmp_path: Path, run: Run, refused: Refused
) -> None:
    publish(run, published, tmp_path, team, name="cam-1", version="1.0.0", release=1)
    refused("registry", "revoke", published, "--team", "audio", code=2, reason="bad_input")
    run("registry", "revoke", published, "--team", "vision")
    for name, version in (("fashion", "1.0.0"), ("fashion", "2.0.0"), ("cam-1", "1.0.0")):
        assert device.find(target_name(name, version)) is None
    # The registry publishes these models itself again; what the team had stays revoked.
    line = refused("registry", "publish", published, tmp_path / "bundle-2.0.0", code=2, reason="bad_input")
    assert "revoked" in line
    publish(run, published, tmp_path, tmp_path / "keys", name="fashion", version="3.0.0", release=3)
    assert device.find(target_name("fashion", "3.0.0")) is not None


def test_adopting_what_a_team_published(
    published: Path, team: Path, device: Client, tmp_path: Path, run: Run
) -> None:
    publish(run, published, tmp_path, team, name="cam-1", version="1.0.0", release=1)
    run("registry", "revoke", published, "--team", "vision", "--adopt")
    for name, version in (("fashion", "1.0.0"), ("fashion", "2.0.0"), ("cam-1", "1.0.0")):
        assert device.find(target_name(name, version)) is not None
    # The same team may come back, and the device follows.
    run("registry", "delegate", published, "fashion", "--team", "vision")
    assert device.find(target_name("fashion", "2.0.0")) is not None


def test_a_team_with_many_versions_has_bins_of_its_own(tmp_path: Path) -> None:
    made = RegistryFolder.create(tmp_path)
    made.publish_many("fashion", 70)
    made.delegate("fashion", "vision")
    made.publish_many("digits", 70)
    device = Client(made.folder, tmp_path / "device", made.root.read_bytes())
    for name in ("fashion", "digits"):
        assert device.find(target_name(name, "70")) is not None
    assert any(".models.2-" in name for name in device.fetched)
    shop = Client(made.folder, tmp_path / "shop", made.root.read_bytes())
    assert shop.find(target_name("fashion", "1")) is not None
    assert any(".team-vision.2-" in name for name in shop.fetched)
    assert len(samples.reader(made.folder).catalogue.targets) == 141


def test_encodings_go_where_their_version_goes(
    published: Path, device: Client, tmp_path: Path, run: Run
) -> None:
    samples.bundle(tmp_path / "big", weights=b"weights " * 4096, version="3.0.0", release=3)
    run("registry", "publish", published, tmp_path / "big")
    offers = encodings.target_name("fashion", "3.0.0")
    assert device.find(offers) is not None
    moved = samples.json_of(run("registry", "delegate", published, "fashion", "--team", "vision", "--json"))
    assert len(moved["moved"]) == 3
    assert device.find(offers) is not None
    run("registry", "revoke", published, "--team", "vision", "--adopt")
    assert device.find(offers) is not None
    run("registry", "revoke", published, "fashion@3.0.0")
    assert device.find(offers) is None
    run("registry", "delegate", published, "fashion", "--team", "vision")
    run("registry", "revoke", published, "--team", "vision")
    assert device.find(target_name("fashion", "1.0.0")) is None


def test_a_known_team_gets_no_other_keys_by_the_way(
    published: Path, team: Path, run: Run, refused: Refused
) -> None:
    for option in ("--count", "--threshold"):
        words = ("registry", "delegate", published, "digits", "--team", "vision", option, "2")
        assert "registry keys" in refused(*words, code=2, reason="bad_input")
    both = ("--key", team / "x.pub", "--count", "2")
    run("registry", "delegate", published, "digits", "--team", "audio", *both, code=2)
    run("registry", "keys", "add", published, "root", "--label", "alice", code=2)


def test_bad_names(published: Path, refused: Refused) -> None:
    for team in ("a.b", "", "UPPER", "x" * 40):
        refused("registry", "delegate", published, "fashion", "--team", team, code=2, reason="bad_input")
    for pattern in ("a/b", "", "x" * 80):
        refused("registry", "delegate", published, pattern, "--team", "vision", code=2, reason="bad_input")
