"""Whoever can write into a registry's folder brings nothing back that the keys here have left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from fleet.registry import repository, seen
from fleet.registry.keys import Keys
from tests.unit.fleet import samples

Run = Callable[..., Result]
Refused = Callable[..., str]


class Replay:
    """The metadata as it is now, to be put back later."""

    def __init__(self, registry: Path, names: str = "*") -> None:
        self.folder = registry / "metadata"
        self.old = {path.name: path.read_bytes() for path in self.folder.glob(names)}

    def bring_back(self) -> None:
        for name, data in self.old.items():
            (self.folder / name).write_bytes(data)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_replayed_registry_is_not_signed_onward(
    published: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    """Else the approvals are gone, the revoked version is back, and so is the operator's old key."""
    replay = Replay(published)
    keys = tmp_path / "keys"
    run("registry", "keys", "new", "alice", "--keys", tmp_path / "alice")
    alice = f"alice={tmp_path / 'alice' / 'alice.pub'}"
    run("registry", "approvers", published, "--needed", "1", "--add", alice)
    run("registry", "revoke", published, "fashion@2.0.0")
    run("registry", "keys", "rotate", published, "operator")
    newest = tree(published)
    replay.bring_back()
    samples.bundle(tmp_path / "b", version="3.0.0", release=3)
    before = tree(published)
    for command in (
        ("publish", published, tmp_path / "b"),
        ("refresh", published),
        ("delegate", published, "cam-*", "--team", "vision"),
        ("revoke", published, "fashion@1.0.0"),
        ("keys", "list", published),
        ("keys", "rotate", published, "targets"),
        ("approvers", published),
        ("deltas", published, "fashion@2.0.0", "--from", "1.0.0"),
    ):
        line = refused("registry", *command, code=4, reason="trust_failed")
        assert "timestamp has version 3, and 6 was seen before" in line
        assert "restore the newest copy" in line
    assert tree(published) == before
    # The newest copy is taken, and an older one only when somebody says that it is the newest there is.
    for name, data in newest.items():
        (published / name).write_bytes(data)
    run("registry", "refresh", published)
    replay.bring_back()
    refused("registry", "refresh", published, code=4, reason="trust_failed")
    (keys / seen.NAME).rename(keys / "lost.json")
    run("registry", "refresh", published)
    assert {p.manifest.version for p in samples.reader(published).published()} == {"1.0.0", "2.0.0"}


def test_a_rotated_root_does_not_go_back(published: Path, run: Run, refused: Refused) -> None:
    run("registry", "keys", "rotate", published, "targets")
    (published / "metadata" / "3.root.json").unlink()
    line = refused("registry", "refresh", published, code=4, reason="trust_failed")
    assert "root has version 2, and 3 was seen before" in line


def test_what_others_have_signed_is_taken_up(
    published: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    """Somebody with keys elsewhere goes on; afterwards neither of the two goes back."""
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "keys", other)
    (other / seen.NAME).unlink()  # as a version of this program that kept none
    replay = Replay(published)
    run("registry", "refresh", published, "--keys", other)
    newer = Replay(published)
    run("registry", "revoke", published, "nothing@1", code=2)  # opened, nothing signed
    for old, keys in ((replay, tmp_path / "keys"), (replay, other)):
        old.bring_back()
        refused("registry", "refresh", published, "--keys", keys, code=4, reason="trust_failed")
    newer.bring_back()
    run("registry", "refresh", published)


def test_every_folder_with_the_pinned_root_counts(
    published: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    """Keys from a stick, which was last used long ago, with the ones that the timer uses daily."""
    stick, daily = tmp_path / "stick", tmp_path / "keys"
    shutil.copytree(daily, stick)
    replay = Replay(published)
    run("registry", "refresh", published, "--keys", daily)
    replay.bring_back()
    both = ("--keys", stick, "--keys", daily)
    refused("registry", "refresh", published, *both, code=4, reason="trust_failed")
    # A folder of another registry's has no say.
    run("registry", "init", tmp_path / "another" / "registry")
    for _ in range(9):
        run("registry", "refresh", tmp_path / "another" / "registry")
    another = ("--keys", stick, "--keys", tmp_path / "another" / "keys")
    run("registry", "refresh", published, *another)


def test_a_kill_before_the_mark_was_written_does_no_harm(published: Path, tmp_path: Path, run: Run) -> None:
    keys = tmp_path / "keys"
    before = (keys / seen.NAME).read_bytes()
    run("registry", "refresh", published)
    (keys / seen.NAME).write_bytes(before)
    run("registry", "keys", "list", published)
    assert (keys / seen.NAME).read_bytes() == before  # who only looks writes nothing
    run("registry", "refresh", published)
    assert (keys / seen.NAME).read_bytes() != before


def test_a_damaged_mark_is_named(published: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "keys" / seen.NAME
    before = tree(published)
    for junk in (b"", b"{}", b'{"schema":1,"versions":[]}'):
        path.write_bytes(junk)
        line = refused("registry", "refresh", published, code=2, reason="bad_input")
        assert str(path) in line
    assert tree(published) == before


@pytest.fixture
def full(published: Path, tmp_path: Path) -> Path:
    """A folder of keys that takes no new file: its place is taken by a folder."""
    path = tmp_path / "keys" / seen.NAME
    path.unlink()
    (path.with_name(f".{path.name}.part")).mkdir()
    return published


def test_nothing_is_signed_where_it_cannot_be_noted(full: Path, refused: Refused) -> None:
    before = tree(full)
    line = refused("registry", "refresh", full, code=2, reason="bad_input")
    assert seen.NAME in line
    assert tree(full) == before


def test_who_only_looks_does_not_wait_for_who_writes(
    published: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    keyring = Keys(tmp_path / "keys", samples.PASSWORD.encode)
    with repository.opened(published, keyring):
        run("registry", "keys", "list", published, "--check")
        run("registry", "list", published)
        refused("registry", "refresh", published, code=2, reason="bad_input")
