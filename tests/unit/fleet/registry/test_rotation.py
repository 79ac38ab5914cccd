"""Keys are replaced, added, removed; python-tuf's own client follows, from the root it was born with."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from tuf.api.metadata import Metadata, Root

from edge_contract import canonical, wire
from edge_contract.manifest import target_name
from fleet.registry import bridge, files, repository
from fleet.registry.reader import Reader
from fleet.registry.trust import Target
from tests.support.ngclient import Client
from tests.support.registry_folder import RegistryFolder
from tests.unit.fleet import samples

Run = Callable[..., Result]
Refused = Callable[..., str]
FASHION = target_name("fashion", "1.0.0")


@pytest.fixture
def three(tmp_path: Path, run: Run) -> Path:
    """A registry with fashion 1.0.0, two of three keys for root and targets, and a device that knows it."""
    folder = tmp_path / "registry"
    counted = [f"--{role}-{what}" for role in ("root", "targets") for what in ("keys", "threshold")]
    numbers = [str(n) for n in (3, 2, 3, 2)]
    run("registry", "init", folder, *[x for pair in zip(counted, numbers, strict=True) for x in pair])
    samples.bundle(tmp_path / "bundle")
    run("registry", "publish", folder, tmp_path / "bundle")
    return folder


@pytest.fixture
def device(three: Path, tmp_path: Path) -> Client:
    made = Client(three, tmp_path / "device", (three.parent / "keys" / "root.json").read_bytes())
    assert made.find(FASHION) is not None
    return made


def newest_root(folder: Path) -> Root:
    return Metadata[Root].from_file(str(folder / "root.json")).signed


def pems(folder: Path, role: str) -> list[Path]:
    return sorted((folder.parent / "keys").glob(f"{role}*.pem"))


def keys_of(run: Run, folder: Path, role: str, *options: str) -> dict[str, object]:
    listed = samples.json_of(run("registry", "keys", "list", folder, "--json", *options))["roles"]
    found: dict[str, object] = next(r for r in listed if r["role"] == role)
    return found


def test_two_of_three_keys_sign_and_one_does_not(
    three: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    for role in ("root", "targets"):
        assert newest_root(three).roles[role].threshold == 2
        assert len(newest_root(three).roles[role].keyids) == 3
        pems(three, role)[0].rename(tmp_path / f"{role}-away.pem")
    run("registry", "refresh", three, "--also", "root", "--also", "targets")
    assert len(samples.reader(three).published()) == 1
    pems(three, "targets")[0].rename(tmp_path / "targets-away-too.pem")
    before = newest_root(three).version
    line = refused("registry", "refresh", three, "--also", "targets", code=2, reason="trust_failed")
    assert "1 of the 2 targets keys" in line
    assert newest_root(three).version == before


def test_keys_may_lie_in_several_folders(three: Path, tmp_path: Path, run: Run) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    for path in pems(three, "root"):
        path.rename(stick / path.name)
    keys = three.parent / "keys"
    run("registry", "refresh", three, "--also", "root", "--keys", keys, "--keys", stick)
    assert newest_root(three).version == 2


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_a_device_follows_when_a_role_gets_new_keys(
    three: Path, device: Client, tmp_path: Path, run: Run, role: str
) -> None:
    before = newest_root(three).roles[role].keyids
    done = samples.json_of(run("registry", "keys", "rotate", three, role, "--json"))
    after = newest_root(three).roles[role].keyids
    assert set(done["dropped"]) == set(before)
    assert set(done["added"]) == set(after)
    assert not set(before) & set(after)
    assert newest_root(three).roles[role].threshold == (2 if role in ("root", "targets") else 1)
    assert device.find(FASHION) is not None
    # A device that comes from the shop with the first root, too.
    assert Client(three, tmp_path / "shop", device.pinned).find(FASHION) is not None
    # The new keys do all that the old ones did.
    samples.bundle(tmp_path / "next", weights=b"next", version="2.0.0", release=2)
    run("registry", "publish", three, tmp_path / "next")
    run("registry", "refresh", three, "--also", "root", "--also", "targets")
    assert device.find(target_name("fashion", "2.0.0")) is not None


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_a_device_that_fetched_the_root_a_moment_before(
    three: Path, device: Client, tmp_path: Path, run: Run, role: str
) -> None:
    shutil.copytree(three, tmp_path / "before")
    run("registry", "keys", "rotate", three, role)
    assert device.find(FASHION, roots=tmp_path / "before") is not None
    assert device.find(FASHION) is not None


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_the_old_keys_are_worth_nothing_afterwards(
    three: Path, run: Run, refused: Refused, role: str
) -> None:
    keys = three.parent / "keys"
    stolen = three.parent / "stolen"
    shutil.copytree(keys, stolen)
    run("registry", "keys", "rotate", three, role)
    again = ("registry", "refresh", three, "--also", "targets", "--keys", stolen)
    refused(*again, code=2, reason="trust_failed")
    for path in stolen.glob(f"{role}*"):
        path.unlink()
    refused(*again, code=2, reason="bad_input")


def test_old_private_keys_are_set_aside(three: Path, run: Run) -> None:
    keys = three.parent / "keys"
    before = {path.read_bytes() for path in pems(three, "targets")}
    done = samples.json_of(run("registry", "keys", "rotate", three, "targets", "--json"))
    assert {Path(path).read_bytes() for path in done["set_aside"]} == before
    assert len(pems(three, "targets")) == 3
    assert not before & {path.read_bytes() for path in pems(three, "targets")}
    assert len(list(keys.glob("targets*.retired-*"))) == 3
    for path in done["written"]:
        assert Path(path).stat().st_mode & 0o777 == 0o600


def test_one_stolen_key_is_replaced(three: Path, device: Client, run: Run) -> None:
    listed = keys_of(run, three, "root", "--check")["keys"]
    assert [Path(k["file"]).name for k in listed] == ["root.pem", "root.2.pem", "root.3.pem"]  # type: ignore[attr-defined, index]
    stolen = listed[1]["keyid"]  # type: ignore[index]
    run("registry", "keys", "rotate", three, "root", "--only", stolen[:8])
    after = newest_root(three).roles["root"]
    assert len(after.keyids) == 3
    assert stolen not in after.keyids
    assert device.find(FASHION) is not None


def test_a_lost_targets_key_is_replaced_without_it(three: Path, device: Client, run: Run) -> None:
    for path in pems(three, "targets"):
        path.unlink()
    run("registry", "keys", "rotate", three, "targets")
    assert device.find(FASHION) is not None


def test_too_few_root_keys_change_nothing(three: Path, tmp_path: Path, refused: Refused) -> None:
    for path in pems(three, "root")[:2]:
        path.unlink()
    before = sorted(p.name for p in (three.parent / "keys").iterdir())
    root = newest_root(three).version
    for role in ("root", "timestamp"):
        refused("registry", "keys", "rotate", three, role, code=2, reason="trust_failed")
    assert sorted(p.name for p in (three.parent / "keys").iterdir()) == before
    assert newest_root(three).version == root


def test_add_remove_threshold(three: Path, device: Client, run: Run, refused: Refused) -> None:
    run("registry", "keys", "add", three, "timestamp", "--threshold", "2")
    assert newest_root(three).roles["timestamp"].threshold == 2
    assert device.find(FASHION) is not None
    first = newest_root(three).roles["timestamp"].keyids[0]
    line = refused("registry", "keys", "remove", three, "timestamp", first[:10], code=2, reason="bad_input")
    assert "threshold of 2" in line
    run("registry", "keys", "remove", three, "timestamp", first[:10], "--threshold", "1")
    assert len(newest_root(three).roles["timestamp"].keyids) == 1
    assert device.find(FASHION) is not None
    refused("registry", "keys", "remove", three, "timestamp", "ffffffffff", code=2, reason="bad_input")
    refused("registry", "keys", "rotate", three, "barber", code=2, reason="bad_input")


def test_the_threshold_alone(three: Path, device: Client, run: Run) -> None:
    run("registry", "keys", "add", three, "root", "--count", "0", "--threshold", "3")
    assert newest_root(three).roles["root"].threshold == 3
    assert device.find(FASHION) is not None


def test_operators(three: Path, tmp_path: Path, run: Run, refused: Refused) -> None:
    def named() -> wire.Operators:
        return samples.reader(three).operators()

    first = named().keys[0].public_hex
    run("registry", "keys", "new", "alice", "--keys", tmp_path / "alice")
    public = tmp_path / "alice" / "alice.pub"
    run(
        "registry",
        "keys",
        "add",
        three,
        "operator",
        "--public",
        public,
        "--label",
        "alice",
        "--threshold",
        "2",
    )
    assert [k.label for k in named().keys] == ["operator", "alice"]
    assert named().threshold == 2
    run(
        "registry",
        "keys",
        "rotate",
        three,
        "operator",
        "--only",
        keys_of(run, three, "operator")["keys"][0]["keyid"],
    )  # type: ignore[index]
    assert {k.label for k in named().keys} == {"operator", "alice"}
    assert first not in {k.public_hex for k in named().keys}
    alice = next(k["keyid"] for k in keys_of(run, three, "operator")["keys"] if k["label"] == "alice")  # type: ignore[attr-defined]
    refused("registry", "keys", "remove", three, "operator", alice, code=2, reason="bad_input")
    run("registry", "keys", "remove", three, "operator", alice, "--threshold", "1")
    assert len(named().keys) == 1
    line = refused("registry", "keys", "add", three, "operator", "--uri", "hsm:1", code=2, reason="bad_input")
    assert "has to be a file" in line


def test_no_more_operators_than_devices_take(registry: Path, run: Run, refused: Refused) -> None:
    run("registry", "keys", "add", registry, "operator", "--count", "15")
    before = sorted(p.name for p in (registry.parent / "keys").iterdir())
    line = refused("registry", "keys", "add", registry, "operator", code=2, reason="bad_input")
    assert "17 operators" in line
    assert sorted(p.name for p in (registry.parent / "keys").iterdir()) == before
    assert len(samples.reader(registry).operators().keys) == 16


def test_the_same_operator_twice_is_one(three: Path, tmp_path: Path, run: Run, refused: Refused) -> None:
    run("registry", "keys", "new", "alice", "--keys", tmp_path / "alice")
    add = ("registry", "keys", "add", three, "operator", "--public", tmp_path / "alice" / "alice.pub")
    run(*add, "--label", "alice")
    run(*add, "--label", "Alice")
    assert [k.label for k in samples.reader(three).operators().keys] == ["operator", "Alice"]
    refused(*add, "--threshold", "3", code=2, reason="bad_input")


def test_a_list_of_operators_that_devices_refuse_is_repaired(
    tmp_path: Path, run: Run, refused: Refused
) -> None:
    """One with 17 keys, as a version without this limit has signed it."""
    made = RegistryFolder.create(tmp_path)
    keys = [wire.OperatorKey(f"{n:064x}", f"number {n}") for n in range(17)]
    data = canonical.to_bytes(
        {"schema": 1, "threshold": 1, "keys": [{"public_hex": k.public_hex, "label": k.label} for k in keys]}
    )
    with made.opened() as repo:
        target = Target(len(data), canonical.sha256_hex(data))
        files.write(repo.path(target.sha256), data)
        repo.draft.add(wire.OPERATORS_TARGET, target)
        list(repository.sign(repo, made.keyring))
    assert len(keys_of(run, made.folder, "operator")["keys"]) == 17  # type: ignore[arg-type]
    last = keys_of(run, made.folder, "operator")["keys"][-1]["keyid"]  # type: ignore[index]
    made.run("keys", "remove", "operator", last)
    assert len(samples.reader(made.folder).operators().keys) == 16


def test_a_lost_operator_key_is_replaced_without_it(three: Path, run: Run) -> None:
    (three.parent / "keys" / "operator.pem").unlink()
    before = samples.reader(three).operators().keys
    run("registry", "keys", "rotate", three, "operator")
    (after,) = samples.reader(three).operators().keys
    assert after not in before
    (three.parent / "keys" / "operator.pem").unlink()
    run("registry", "keys", "new", "alice", "--keys", three.parent / "alice")
    public = three.parent / "alice" / "alice.pub"
    run("registry", "keys", "add", three, "operator", "--public", public, "--label", "alice")
    lost = keys_of(run, three, "operator")["keys"][0]["keyid"]  # type: ignore[index]
    run("registry", "keys", "remove", three, "operator", lost)
    assert [k.label for k in samples.reader(three).operators().keys] == ["alice"]


def test_a_reader_at_any_moment_and_a_kill_after_any_write(tmp_path: Path) -> None:
    """Every state of the folder between two writes is a registry that both old and new devices can read."""
    made = RegistryFolder.create(tmp_path / "made")
    names = made.publish_many("fashion", 70)
    pinned = made.root.read_bytes()
    for role in ("root", "targets", "snapshot", "timestamp"):
        states = made.states_while("keys", "rotate", role, "--insecure-no-password")
        assert len(states) >= 1
        for number, state in enumerate(states):
            found = Reader(str(state), pinned).catalogue.find(names[-1])
            assert found is not None, (role, number)
        # After a kill in the middle, rotating again ends well.
        middle = made.copy(tmp_path / f"killed-{role}")
        middle.put_back(states[len(states) // 2])
        middle.rotate(role)
        assert Reader(str(middle.folder), pinned).catalogue.find(names[0]) is not None


def under_way(states: list[Path]) -> list[Path]:
    """Those that a kill between the two roots of a rotation leaves."""

    def newest(state: Path) -> Root:
        found = max((state / "metadata").glob("*.root.json"), key=lambda p: int(p.name.split(".")[0]))
        return Metadata[Root].from_file(str(found)).signed

    found = [state for state in states if bridge.FIELD in newest(state).unrecognized_fields]
    assert found
    return found


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_a_rotation_that_was_killed_is_finished_not_begun_anew(tmp_path: Path, role: str) -> None:
    options = ("--targets-keys", "3", "--targets-threshold", "2")
    made = RegistryFolder.create(tmp_path / "made", *options)
    first = newest_root(made.folder).roles[role]
    states = made.states_while("keys", "rotate", role, "--insecure-no-password")
    wanted = newest_root(made.folder).roles[role]
    assert bridge.FIELD not in newest_root(made.folder).unrecognized_fields
    files = sorted(made.keys.iterdir())
    for state in under_way(states):
        made.put_back(state)
        done = made.run("keys", "rotate", role, "--insecure-no-password")
        assert done["finished_earlier"]
        assert set(done["added"]) == set(wanted.keyids)
        assert set(done["dropped"]) == set(first.keyids)
        after = newest_root(made.folder)
        assert (set(after.roles[role].keyids), after.roles[role].threshold) == (
            set(wanted.keyids),
            wanted.threshold,
        )
        assert bridge.FIELD not in after.unrecognized_fields
        assert sorted(made.keys.iterdir()) == files
        assert Client(made.folder, tmp_path / state.name, made.root.read_bytes()).find("operators.json")
    again = made.run("keys", "rotate", role, "--insecure-no-password")
    assert not again["finished_earlier"]
    assert len(newest_root(made.folder).roles[role].keyids) == len(wanted.keyids)


def test_a_higher_threshold_survives_a_kill(tmp_path: Path) -> None:
    made = RegistryFolder.create(tmp_path)
    command = ("keys", "add", "timestamp", "--threshold", "2", "--insecure-no-password")
    states = made.states_while(*command)
    made.put_back(under_way(states)[1])
    assert newest_root(made.folder).roles["timestamp"].threshold == 1
    listed = made.run("keys", "list")["roles"]
    assert [role["role"] for role in listed if role["unfinished"]] == ["timestamp"]
    made.run("keys", "rotate", "timestamp", "--insecure-no-password")
    role = newest_root(made.folder).roles["timestamp"]
    assert (role.threshold, len(role.keyids)) == (2, 2)
    assert not any(role["unfinished"] for role in made.run("keys", "list")["roles"])


def test_a_rotation_whose_new_keys_are_lost_is_begun_anew(tmp_path: Path) -> None:
    made = RegistryFolder.create(tmp_path / "made")
    keys = tmp_path / "keys-before"
    shutil.copytree(made.keys, keys)
    for state in under_way(made.states_while("keys", "rotate", "targets", "--insecure-no-password")):
        lost = set(newest_root(made.folder).roles["targets"].keyids)
        made.put_back(state)
        shutil.rmtree(made.keys)
        shutil.copytree(keys, made.keys)
        made.rotate("targets")
        after = newest_root(made.folder)
        assert len(after.roles["targets"].keyids) == 1
        assert not lost & set(after.roles["targets"].keyids)
        assert bridge.FIELD not in after.unrecognized_fields
        assert Client(made.folder, tmp_path / state.name, made.root.read_bytes()).find("operators.json")


def test_a_stick_without_links_and_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """As vfat is: no hard links, no modes but the mount's."""
    made = RegistryFolder.create(tmp_path)

    def no_link(source: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))

    fchmod = os.fchmod

    def no_modes(handle: int, _: int) -> None:
        fchmod(handle, 0o755)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "fchmod", no_modes)
    words = ("registry", "keys", "rotate", made.folder, "root", "--keys", made.keys, "--insecure-no-password")
    result = run(*words)
    assert list(made.keys.glob("root.pem.retired-*"))
    assert "root.2.pem: others can read this private key" in result.stderr
    assert newest_root(made.folder).version == 2


def test_an_old_key_that_cannot_be_set_aside_is_a_warning(three: Path, device: Client, run: Run) -> None:
    keyid = newest_root(three).roles["timestamp"].keyids[0]
    taken = three.parent / "keys" / f"timestamp.pem.retired-{keyid[:8]}"
    taken.write_bytes(b"somebody's")
    result = run("registry", "keys", "rotate", three, "timestamp")
    assert "timestamp.pem: the old key could not be set aside" in result.stderr
    assert taken.read_bytes() == b"somebody's"
    assert newest_root(three).roles["timestamp"].keyids != [keyid]
    assert device.find(FASHION) is not None


def test_ten_rotations_of_the_root(tmp_path: Path) -> None:
    made = RegistryFolder.create(tmp_path)
    device = Client(made.folder, tmp_path / "device", made.root.read_bytes())
    assert device.find("operators.json") is not None
    made.rotate_root(10)
    assert newest_root(made.folder).version == 11
    assert device.find("operators.json") is not None
    assert json.loads((device.state / "root.json").read_bytes())["signed"]["version"] == 11
