"""Renewing from a timer: what is due is signed, what is not is left, and what cannot be is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import Result
from tuf.api.exceptions import ExpiredMetadataError

from tests.support.ngclient import Client
from tests.support.registry_folder import RegistryFolder
from tests.unit.fleet import samples

Run = Callable[..., Result]
Refused = Callable[..., str]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegistryFolder:
    monkeypatch.setenv("EDGEWARD_KEYS", str(tmp_path / "keys"))
    return RegistryFolder.create(tmp_path)


def days(count: float) -> datetime:
    """So many days from now."""
    return datetime.now(UTC) + timedelta(days=count)


def refresh(run: Run, made: RegistryFolder, *more: object, code: int = 0) -> dict[str, object]:
    result: dict[str, object] = samples.json_of(
        run("registry", "refresh", made.folder, "--json", *more, code=code)
    )
    return result


def names(made: RegistryFolder) -> set[str]:
    return {path.name for path in (made.folder / "metadata").iterdir()}


def test_nothing_to_do_is_one_line_and_no_write(made: RegistryFolder, run: Run) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.folder.rglob("*")}
    assert refresh(run, made, "--if-expiring-within", "5") == {"ok": True, "signed": [], "expiring": {}}
    text = run("registry", "refresh", made.folder, "--if-expiring-within", "5").stdout
    assert text == "nothing to sign\n"
    assert {p: p.stat().st_mtime_ns for p in made.folder.rglob("*")} == before


def test_only_what_is_due_is_signed(made: RegistryFolder, run: Run) -> None:
    before = names(made)
    assert refresh(run, made, "--if-expiring-within", "8")["signed"] == ["timestamp"]
    assert names(made) == before
    assert refresh(run, made, "--if-expiring-within", "31")["signed"] == ["snapshot", "timestamp"]
    assert names(made) - before == {"2.snapshot.json"}


def test_what_a_timer_cannot_sign_is_told_in_time(made: RegistryFolder, run: Run) -> None:
    made.sign_at(days(-60), "targets")  # 30 days are left to the targets
    done = refresh(run, made, "--if-expiring-within", "40", code=3)
    assert (done["ok"], done["signed"]) == (False, ["snapshot", "timestamp"])
    assert list(done["expiring"]) == ["targets"]  # type: ignore[call-overload]
    lines = run("registry", "refresh", made.folder, "--if-expiring-within", "40", code=3).stderr
    assert "--also targets" in lines
    done = refresh(run, made, "--if-expiring-within", "40", "--also", "targets")
    assert done["signed"] == ["targets", "snapshot", "timestamp"]
    assert refresh(run, made, "--if-expiring-within", "6")["signed"] == []


def test_bins_and_teams_are_renewed_with_their_keys(made: RegistryFolder, tmp_path: Path, run: Run) -> None:
    made.publish_many("fashion", 70)
    made.delegate("digits", "vision")
    made.publish_many("digits", 70)
    device = Client(made.folder, tmp_path / "device", made.root.read_bytes())
    made.sign_at(days(-100), "targets", "team-vision")
    made.refresh()
    with pytest.raises(ExpiredMetadataError):
        device.find("models/fashion/1.json")
    done = refresh(run, made, "--if-expiring-within", "1", code=3)
    assert list(done["expiring"]) == ["targets", "team-vision"]  # type: ignore[call-overload]
    made.refresh("--also", "targets")
    assert device.find("models/fashion/70.json") is not None
    with pytest.raises(ExpiredMetadataError):
        device.find("models/digits/1.json")
    made.refresh("--also", "team-vision")
    assert device.find("models/digits/70.json") is not None


def test_a_team_that_lets_its_metadata_expire_stops_nobody_else(
    made: RegistryFolder, tmp_path: Path, run: Run
) -> None:
    samples.bundle(tmp_path / "a")
    run("registry", "publish", made.folder, tmp_path / "a")
    made.delegate("digits", "vision")
    samples.bundle(tmp_path / "b", name="digits")
    run("registry", "publish", made.folder, tmp_path / "b")
    made.sign_at(days(-100), "team-vision")
    made.refresh()
    listed = samples.json_of(run("registry", "list", made.folder, "--json"))
    assert [m["name"] for m in listed["models"]] == ["fashion"]
    assert listed["expired_teams"] == ["vision"]
    assert "vision" in run("registry", "list", made.folder).stderr
    samples.bundle(tmp_path / "c", weights=b"2", version="2.0.0", release=2)
    run("registry", "publish", made.folder, tmp_path / "c")


def test_a_registry_of_a_year_ago_comes_back(
    made: RegistryFolder, tmp_path: Path, run: Run, refused: Refused
) -> None:
    device = Client(made.folder, tmp_path / "device", made.root.read_bytes())
    made.sign_at(days(-400), "targets", "root")
    stamp = json.loads((made.folder / "metadata" / "timestamp.json").read_bytes())["signed"]
    assert abs(stamp["x-edgeward-signed-at"] - days(-400).timestamp()) < 60
    with pytest.raises(ExpiredMetadataError):
        device.find("operators.json")
    refused("registry", "list", made.folder, code=5, reason="trust_expired")
    refresh(run, made, "--also", "root", "--also", "targets")
    assert device.find("operators.json") is not None


def test_a_role_that_there_is_not(made: RegistryFolder, refused: Refused) -> None:
    for role in ("barber", "snapshot", "team-vision"):
        refused("registry", "refresh", made.folder, "--also", role, code=2, reason="bad_input")


def test_other_periods_make_the_root_due(made: RegistryFolder, run: Run) -> None:
    change = ("--also", "root", "--expires-days-timestamp", "1", "--if-expiring-within", "1")
    assert refresh(run, made, *change)["signed"] == ["root"]
    assert refresh(run, made, *change)["signed"] == []
    refresh(run, made)
    timestamp = json.loads((made.folder / "metadata" / "timestamp.json").read_bytes())["signed"]
    assert datetime.fromisoformat(timestamp["expires"]) < days(1.1)
