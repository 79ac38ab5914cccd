"""A version is signed into the targets only with as many approvals as signed metadata demands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from edge_contract.manifest import target_name
from fleet.registry import approvals, repository
from fleet.registry.keys import Keys
from tests.support.ngclient import Client
from tests.unit.fleet import samples

Run = Callable[..., Result]
Refused = Callable[..., str]
NAME = target_name("fashion", "1.0.0")


@pytest.fixture
def people(tmp_path: Path, run: Run) -> Path:
    """Keys of alice, bob and mallory."""
    folder = tmp_path / "people"
    for name in ("alice", "bob", "carol", "mallory"):
        run("registry", "keys", "new", name, "--keys", folder)
    return folder


@pytest.fixture
def staged(registry: Path, people: Path, tmp_path: Path, run: Run) -> Path:
    """Two of alice, bob and carol have to approve; fashion 1.0.0 waits for them."""
    added = [x for name in ("alice", "bob", "carol") for x in ("--add", f"{name}={people / name}.pub")]
    run("registry", "approvers", registry, "--needed", "2", *added)
    samples.bundle(tmp_path / "bundle")
    done = samples.json_of(run("registry", "publish", registry, tmp_path / "bundle", "--json"))
    assert (done["published"], done["staged"], done["approvals_needed"]) == (False, True, 2)
    return registry


@pytest.fixture
def device(staged: Path, tmp_path: Path) -> Client:
    return Client(staged, tmp_path / "device", (tmp_path / "keys" / "root.json").read_bytes())


def approve(
    run: Callable[..., object], registry: Path, key: Path, *more: object, **expected: object
) -> object:
    """With the approver's own copy, unless `more` says what they looked at."""
    copy = () if "--manifest-sha256" in more else (registry.parent / "bundle",)
    return run("registry", "approve", registry, "fashion@1.0.0", *copy, "--key", key, *more, **expected)


def test_two_approvals_publish_and_one_does_not(
    staged: Path, people: Path, device: Client, tmp_path: Path, run: Run, refused: Refused
) -> None:
    assert device.find(NAME) is None
    approve(run, staged, people / "alice.pem")
    approve(run, staged, people / "alice.pem")  # once more is not one more
    again = samples.json_of(run("registry", "publish", staged, tmp_path / "bundle", "--json"))
    assert (again["published"], again["approved_by"]) == (False, ["alice"])
    assert device.find(NAME) is None
    (pending,) = samples.json_of(run("registry", "list", staged, "--json"))["pending"]
    assert pending["approved_by"] == ["alice"]
    assert "1 of 2 approvals by alice" in run("registry", "list", staged).stdout
    finish = ("registry", "publish", staged, "--finish", "fashion@1.0.0")
    early = samples.json_of(run(*finish, "--json", code=3))
    assert (early["ok"], early["staged"]) == (False, True)
    assert "1 of 2 approvals" in run(*finish, code=3).stdout
    deploy = ("deploy", "fashion@1.0.0", "--device", "a", "--registry", staged)
    line = refused(*deploy, code=2, reason="not_published")
    assert "awaits approvals: it has 1 of 2 [" in line
    assert "registry approve" in line
    approve(run, staged, people / "bob.pem")
    done = samples.json_of(run("registry", "publish", staged, "--finish", "fashion@1.0.0", "--json"))
    assert (done["published"], done["approved_by"]) == (True, ["alice", "bob"])
    assert device.find(NAME) is not None
    listed = samples.json_of(run("registry", "list", staged, "--json"))
    assert listed["models"][0]["approved_by"] == ["alice", "bob"]
    assert listed["pending"] == []
    assert not list((staged / "pending").iterdir())


def test_the_last_approval_may_publish(staged: Path, people: Path, device: Client, run: Run) -> None:
    approve(run, staged, people / "alice.pem", "--finish")
    assert device.find(NAME) is None
    approve(run, staged, people / "carol.pem", "--finish")
    assert device.find(NAME) is not None


def test_staging_and_approving_need_no_key_of_the_registry(
    staged: Path, people: Path, tmp_path: Path, run: Run
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "keys" / "root.json", bare)
    samples.bundle(tmp_path / "two", version="2.0.0", release=2)
    run("registry", "publish", staged, tmp_path / "two", "--keys", bare)
    approve(run, staged, people / "alice.pem", "--keys", bare)


def test_strangers_approve_nothing(staged: Path, people: Path, refused: Refused, run: Run) -> None:
    line = approve(refused, staged, people / "mallory.pem", code=2, reason="unsigned")
    assert "approvers" in str(line)
    approve(refused, staged, staged.parent / "keys" / "targets.pem", code=2, reason="unsigned")
    refused(
        "registry",
        "approve",
        staged,
        "fashion@9",
        "--key",
        people / "bob.pem",
        "--manifest-sha256",
        "0" * 12,
        code=2,
        reason="not_published",
    )


def test_approvals_of_another_manifest_do_not_count(
    staged: Path, people: Path, device: Client, tmp_path: Path, run: Run, refused: Refused
) -> None:
    """Whoever can write into the folder cannot slip another model under approvals that were given."""
    for name in ("alice", "bob"):
        approve(run, staged, people / f"{name}.pem")
    other = samples.bundle(tmp_path / "other", weights=b"other")
    (staged / "pending" / "fashion@1.0.0" / "manifest.json").write_bytes(
        (tmp_path / "other" / "manifest.json").read_bytes()
    )
    shutil.copytree(tmp_path / "other" / "blobs", staged / "blobs", dirs_exist_ok=True)
    done = samples.json_of(run("registry", "publish", staged, "--finish", "fashion@1.0.0", "--json", code=3))
    assert (done["published"], done["approved_by"], done["manifest_sha256"]) == (
        False,
        [],
        samples.digest(other),
    )
    assert device.find(NAME) is None
    looked_at = samples.digest(samples.bundle(tmp_path / "bundle"))[:12]
    approve(
        refused, staged, people / "bob.pem", "--manifest-sha256", looked_at, code=4, reason="digest_mismatch"
    )


def test_nobody_approves_blindly(
    staged: Path, people: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    blind = ("registry", "approve", staged, "fashion@1.0.0", "--key", people / "alice.pem")
    assert "BUNDLE_DIR" in run(*blind, code=2).stderr
    for short in ("", "a", "3f2a91bc0d1", "not a digest"):
        refused(*blind, "--manifest-sha256", short, code=2, reason="bad_input")
    # Somebody has exchanged what is staged: the approver's own copy, or its digest, shows it.
    samples.bundle(tmp_path / "evil", weights=b"evil")
    shutil.copy(tmp_path / "evil" / "manifest.json", staged / "pending" / "fashion@1.0.0" / "manifest.json")
    refused(*blind, tmp_path / "bundle", code=4, reason="digest_mismatch")
    samples.bundle(tmp_path / "two", version="2.0.0", release=2)
    line = refused(*blind, tmp_path / "two", code=2, reason="bad_input")
    assert "fashion@2.0.0" in line
    assert not list((staged / "pending" / "fashion@1.0.0").glob("*.approval"))


def test_a_list_shows_teams_and_approvers(staged: Path, people: Path, run: Run) -> None:
    for name in ("alice", "bob"):
        approve(run, staged, people / f"{name}.pem", "--finish")
    run("registry", "delegate", staged, "fashion", "--team", "vision")
    head, row = run("registry", "list", staged).stdout.splitlines()[:2]
    assert "Team" in head
    assert "Approved by" in head
    assert " vision " in row
    assert " alice, bob " in row


def test_what_is_wrong_below_pending_is_named_and_the_rest_listed(
    staged: Path, run: Run, refused: Refused
) -> None:
    pending = staged / "pending"
    for name, data in (("a@1", b"{}"), ("nothing", b"{}"), (".x@..", b""), ("digits@1", None)):
        (pending / name).mkdir()
        if data is None:
            shutil.copy(pending / "fashion@1.0.0" / "manifest.json", pending / name)
        else:
            (pending / name / "manifest.json").write_bytes(data)
    result = run("registry", "list", staged)
    assert "pending: fashion@1.0.0" in result.stdout
    assert len(result.stderr.splitlines()) == 4, result.stderr
    listed = samples.json_of(run("registry", "list", staged, "--json"))
    assert [p["name"] for p in listed["pending"]] == ["fashion"]
    assert len(listed["pending_problems"]) == 4
    (pending / "fashion@1.0.0" / "x.approval").mkdir()
    (problem,) = [
        p
        for p in samples.json_of(run("registry", "list", staged, "--json"))["pending_problems"]
        if "fashion" in p and "digits" not in p
    ]
    assert "x.approval" in problem


def test_forged_and_foreign_approvals_do_not_count(
    staged: Path, people: Path, device: Client, run: Run
) -> None:
    folder = staged / "pending" / "fashion@1.0.0"
    approve(run, staged, people / "alice.pem")
    (path,) = folder.glob("*.approval")
    (folder / "0000.approval").write_bytes(path.read_bytes())
    (folder / "1111.approval").write_bytes(b"{}")
    (folder / "2222.approval").write_bytes(path.read_bytes().replace(b'"sig":"', b'"sig":"AAAA'))
    done = samples.json_of(run("registry", "publish", staged, "--finish", "fashion@1.0.0", "--json", code=3))
    assert done["approved_by"] == ["alice"]
    assert device.find(NAME) is None


def test_the_policy(staged: Path, tmp_path: Path, people: Path, run: Run, refused: Refused) -> None:
    shown = samples.json_of(run("registry", "approvers", staged, "--json"))
    assert (shown["needed"], [a["label"] for a in shown["approvers"]]) == (2, ["alice", "bob", "carol"])
    refused("registry", "approvers", staged, "--needed", "4", code=2, reason="bad_input")
    refused("registry", "approvers", staged, "--remove", "mallory", code=2, reason="bad_input")
    refused("registry", "approvers", staged, "--team", "vision", code=2, reason="bad_input")
    # A team may have a policy of its own, which it cannot lift itself.
    run("registry", "delegate", staged, "cam-*", "--team", "vision")
    run("registry", "approvers", staged, "--team", "vision", "--needed", "1")
    samples.bundle(tmp_path / "cam", name="cam-1")
    done = samples.json_of(run("registry", "publish", staged, tmp_path / "cam", "--json"))
    assert (done["staged"], done["approvals_needed"]) == (True, 1)
    (tmp_path / "keys" / "targets.pem").rename(tmp_path / "targets-offline.pem")
    refused("registry", "approvers", staged, "--needed", "0", code=2, reason="bad_input")
    refused("registry", "approvers", staged, "--team", "vision", "--needed", "0", code=2, reason="bad_input")


def test_approvals_are_counted_by_key(staged: Path, people: Path, refused: Refused) -> None:
    public = people / "mallory.pub"
    twice = ("--add", f"a={public}", "--add", f"b={public}", "--needed", "5")
    line = refused("registry", "approvers", staged, *twice, code=2, reason="bad_input")
    assert "4 different keys" in line


def test_no_more_approvers_than_there_may_be(
    staged: Path, tmp_path: Path, people: Path, run: Run, refused: Refused
) -> None:
    crowd = [x for n in range(14) for x in ("--add", f"n{n}={people / 'mallory.pub'}")]
    line = refused("registry", "approvers", staged, *crowd, code=2, reason="bad_input")
    assert "17 approvers" in line
    # A list that is too long already, as a version without this limit has signed it, can be shortened.
    keys = Keys(tmp_path / "keys", samples.PASSWORD.encode)
    with repository.opened(staged, keys) as repo:
        field = repo.draft.tree.top.unrecognized_fields[approvals.FIELD]
        field["keys"] += [{"public_hex": f"{n:064x}", "label": f"n{n}"} for n in range(14)]
        repo.draft.change({"targets"})
        list(repository.sign(repo, keys))
    run("registry", "list", staged)
    run("registry", "approvers", staged, "--remove", "n3")
    assert len(samples.json_of(run("registry", "approvers", staged, "--json"))["approvers"]) == 16


def test_an_approver_who_left_does_not_count(staged: Path, people: Path, device: Client, run: Run) -> None:
    for name in ("alice", "bob"):
        approve(run, staged, people / f"{name}.pem")
    run("registry", "approvers", staged, "--remove", "bob")
    done = samples.json_of(run("registry", "publish", staged, "--finish", "fashion@1.0.0", "--json", code=3))
    assert (done["published"], done["approved_by"]) == (False, ["alice"])
    assert device.find(NAME) is None


def test_a_pending_version_is_dropped(staged: Path, run: Run, refused: Refused) -> None:
    run("registry", "revoke", staged, "fashion@1.0.0")
    refused("registry", "publish", staged, "--finish", "fashion@1.0.0", code=2, reason="not_published")
    (staged / "pending" / "fashion@3").mkdir()  # what a kill while staging leaves
    assert samples.json_of(run("registry", "list", staged, "--json"))["pending"] == []
