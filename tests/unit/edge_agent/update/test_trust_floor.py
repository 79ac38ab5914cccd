"""Rollback and freeze protection hold without python-tuf's files and without a clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_contract.errors import Reason
from edge_contract.wire import OPERATORS_TARGET
from tests.support.http_registry import FolderServer
from tests.support.trust_box import TrustBox
from tests.support.tuf_repository import YEAR_S, TufRepository

DAY_S = 86400
TOP = ("root", "timestamp", "snapshot", "targets")


@pytest.fixture
def repository(tmp_path: Path) -> TufRepository:
    return TufRepository(tmp_path / "registry")


@pytest.fixture
def server(repository: TufRepository) -> Iterator[FolderServer]:
    with FolderServer(repository.folder) as server:
        yield server


@pytest.fixture
def box(tmp_path: Path, repository: TufRepository, server: FolderServer) -> TrustBox:
    return TrustBox(tmp_path / "box", repository.root_path, server)


def test_a_refresh_raises_the_floor_in_both_copies(box: TrustBox, repository: TufRepository) -> None:
    box.refresh()
    repository.sign()
    box.refresh()
    assert box.versions() == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}
    assert box.floor.value.at_s == int(repository.now_s)
    assert box.copies[0].read_bytes() == box.copies[1].read_bytes()


def test_replayed_metadata_is_refused_also_when_the_device_has_lost_its_own(
    box: TrustBox, repository: TufRepository, server: FolderServer, tmp_path: Path
) -> None:
    box.refresh()
    old = repository.copy_files(tmp_path / "old")
    repository.sign()
    box.refresh()
    before = box.floor.value
    server.folder = old
    for _ in range(2):  # also when what was refused lies in python-tuf's folder by now
        box.forget_metadata()
        error = box.refused(Reason.TRUST_FAILED)
        assert "serves version 1" in error.what
        assert "verified version 2" in error.what
    assert box.floor.value == before
    server.folder = repository.folder
    box.refresh()


def test_roots_that_were_verified_are_not_undone_when_the_rest_fails(
    box: TrustBox, repository: TufRepository, server: FolderServer, tmp_path: Path
) -> None:
    """A root revokes keys. It counts from the moment it is verified."""
    box.refresh()
    old = repository.copy_files(tmp_path / "old")
    repository.rotate("targets")
    repository.sign()
    (repository.folder / "metadata" / "2.snapshot.json").write_bytes(b"{}")
    box.refused(Reason.TRUST_FAILED)
    assert box.versions()["root"] == 2
    box.forget_metadata()
    server.folder = old
    assert "root.json" in box.refused(Reason.TRUST_FAILED).what


def test_ten_rotations_of_every_key_are_followed(box: TrustBox, repository: TufRepository) -> None:
    box.refresh()
    for turn in range(10):
        repository.rotate("root", count=3, threshold=2)
        repository.rotate(("targets", "snapshot", "timestamp")[turn % 3])
    repository.sign()
    box.refresh()
    assert box.versions()["root"] == 21


def test_a_root_below_its_threshold_is_refused(box: TrustBox, repository: TufRepository) -> None:
    repository.rotate("root", count=3, threshold=2)
    repository.sign()
    box.refresh()
    repository.signers["root"] = repository.signers["root"][:1]
    repository.sign_root()
    box.refused(Reason.TRUST_FAILED)
    assert box.versions()["root"] == 2


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_rotation_is_the_way_out_of_an_absurd_version(
    box: TrustBox, repository: TufRepository, role: str
) -> None:
    """Fast-forward recovery: what a stolen key signed binds no longer once the key is gone."""
    signed = getattr(repository, role)
    box.refresh()
    sane = signed.version
    signed.version = 1 << 40
    repository.sign()
    box.refresh()
    assert box.versions()[role] > 1 << 40
    signed.version = sane
    for each in ("timestamp", "snapshot", role):
        repository.rotate(each)
    repository.sign()
    box.refresh()
    assert box.versions()[role] == sane + 1
    assert box.refresh().target(OPERATORS_TARGET) is not None


def test_delegated_roles_count_and_are_durable_too(
    box: TrustBox, repository: TufRepository, server: FolderServer, tmp_path: Path
) -> None:
    repository.delegate("team", "models/*")
    repository.add("models/a", b"a", "team")
    repository.sign()
    box.refresh("models/a")
    assert box.versions()["team"] == 1
    team = (repository.folder / "metadata" / "1.team.json").read_bytes()
    repository.sign()
    box.refresh("models/a")
    assert box.versions()["team"] == 2
    assert (box.metadata / "team.json").is_file()
    # Who holds the online keys names the team's older metadata in a new snapshot.
    box.forget_metadata()
    repository.sign()
    repository.snapshot.meta["team.json"].version = 1
    (repository.folder / "metadata" / "1.team.json").write_bytes(team)
    repository.sign_online()
    assert "team.json" in box.refused(Reason.TRUST_FAILED, "models/a").what


def test_targets_in_hash_bins_are_found(box: TrustBox, repository: TufRepository) -> None:
    roles = repository.hash_bins(4)
    assert len(roles) == 16
    bins = repository.targets.delegations
    assert bins is not None
    assert bins.succinct_roles is not None
    names = [f"models/{number}" for number in range(40)]
    for name in names:
        repository.add(name, name.encode(), bins.succinct_roles.get_role_for_target(name))
    repository.sign()
    trust = box.refresh(*names[:3])
    assert trust.target(names[7]) is not None
    assert trust.target("models/none") is None
    loaded = {bins.succinct_roles.get_role_for_target(name) for name in [*names[:3], names[7], "models/none"]}
    assert loaded == set(box.versions()) - set(TOP)


# --- time ---


def test_a_clock_of_1970_freezes_nothing(box: TrustBox, repository: TufRepository) -> None:
    repository.lifetime_s["timestamp"] = 7 * DAY_S
    repository.sign()
    box.refresh()
    repository.now_s += 30 * DAY_S
    repository.sign()
    box.clock_s = repository.now_s
    box.refresh()
    # From here on the registry is frozen by somebody, and the clock starts anew with every boot.
    box.clock_s = 0.0
    box.refresh()
    repository.timestamp.version += 1  # the same signatures again, a version higher, but made long ago
    repository.now_s -= 29 * DAY_S
    repository.sign_online()
    error = box.refused(Reason.TRUST_EXPIRED)
    assert "1970-01-01" in error.what
    assert "newest signature" in error.what


def test_a_timestamp_that_expired_before_the_registrys_time_is_refused_on_the_first_day(
    box: TrustBox, repository: TufRepository
) -> None:
    """Snapshot and targets are judged by the time that the timestamp of the same refresh brought."""
    repository.lifetime_s["targets"] = 10 * DAY_S
    repository.sign()
    repository.now_s += 20 * DAY_S
    repository.sign_online()
    box.clock_s = 0.0
    assert "targets.json is expired" in box.refused(Reason.TRUST_EXPIRED).what


def test_a_clock_ten_years_ahead_poisons_nothing(box: TrustBox, repository: TufRepository) -> None:
    box.refresh()
    before = box.floor.value
    now_s, box.clock_s = box.clock_s, box.clock_s + 10 * YEAR_S
    error = box.refused(Reason.TRUST_EXPIRED)
    assert "clock says 2036" in error.what
    assert "clock" in error.next_step
    repository.sign()
    box.refused(Reason.TRUST_EXPIRED)
    box.clock_s = now_s
    box.refresh()
    assert box.floor.value.at_s == before.at_s
    assert box.versions()["timestamp"] == 2


def test_a_time_that_a_stolen_key_signed_is_forgotten_with_the_key(
    box: TrustBox, repository: TufRepository
) -> None:
    repository.lifetime_s["timestamp"] = 7 * DAY_S
    box.refresh()
    now_s, repository.now_s = repository.now_s, repository.now_s + 300 * DAY_S
    repository.sign_online()
    box.refresh()
    assert box.floor.value.at_s == int(repository.now_s)
    repository.now_s = now_s
    repository.sign()
    assert "expired" in box.refused(Reason.TRUST_EXPIRED).what
    repository.rotate("timestamp")
    repository.sign()
    box.refresh()
    assert box.floor.value.at_s == int(now_s)


def test_a_time_at_which_everything_would_be_expired_is_not_believed(
    box: TrustBox, repository: TufRepository
) -> None:
    """Somebody signed on a machine whose clock was wrong: no device must have to live with that."""
    box.refresh()
    now_s, repository.now_s = repository.now_s, repository.now_s + 50 * YEAR_S
    repository.sign_online()
    box.refused(Reason.TRUST_EXPIRED)
    assert box.floor.value.at_s == int(now_s)
    repository.now_s = now_s
    repository.sign()
    box.refresh()
    assert box.versions()["timestamp"] == 3


def test_a_registry_that_does_not_say_when_it_signed_is_believed_without(
    box: TrustBox, repository: TufRepository
) -> None:
    repository.says_when = False
    repository.sign()
    box.refresh()
    assert box.floor.value.at_s == 0
    repository.says_when = True
    for nonsense in (-1, True, "1", [], 1 << 60):
        repository.sign_online(signed_at=nonsense)
        box.refresh()
        assert box.floor.value.at_s == 0


def test_damaged_copies_of_the_floor_are_repaired_by_a_refresh(box: TrustBox) -> None:
    box.refresh()
    value = box.floor.value
    box.copies[0].write_bytes(b"")
    box.copies[1].write_bytes(box.copies[1].read_bytes())
    assert box.floor.problems
    box.refresh()
    assert (box.floor.value, box.floor.problems) == (value, [])


# --- what a filesystem check may leave ---


@pytest.mark.parametrize("case", ["file for folder", "file for history", "folder for file", "cut-off write"])
def test_disorder_in_the_folder_of_metadata_is_tidied(box: TrustBox, case: str) -> None:
    box.refresh()
    if case == "file for folder":
        box.metadata.rename(box.folder / "lost")
        box.metadata.write_bytes(b"")
    elif case == "file for history":
        (box.metadata / "root_history").rename(box.metadata / "lost+found")
        (box.metadata / "root_history").write_bytes(b"")
    elif case == "folder for file":
        for path in ("timestamp.json", "root_history/1.root.json"):
            (box.metadata / path).unlink()
            (box.metadata / path).mkdir()
    else:
        (box.metadata / "tmpab12cd").write_bytes(b"half")
    box.refresh()
    found = {str(path.relative_to(box.metadata)) for path in box.metadata.rglob("*") if path.is_file()}
    assert found == {f"{role}.json" for role in TOP} | {"root_history/1.root.json"}
