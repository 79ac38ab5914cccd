"""What trust.py takes from the inside of python-tuf is there, and means what it is taken for."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
from tuf.api.exceptions import ExpiredMetadataError
from tuf.ngclient.updater import Updater

from edge_agent.update import trust
from tests.support.http_registry import FolderServer
from tests.support.tuf_repository import YEAR_S, TufRepository

CONSTRAINTS = Path(__file__).parents[4] / "constraints.txt"


@pytest.fixture
def repository(tmp_path: Path) -> TufRepository:
    made = TufRepository(tmp_path / "registry")
    made.delegate("team", "models/*")
    made.add("models/a", b"a", "team")
    made.sign()
    return made


def updater(repository: TufRepository, server: FolderServer, folder: Path) -> Updater:
    folder.mkdir(exist_ok=True)
    pinned = repository.root_path.read_bytes()
    return Updater(str(folder), f"{server.url}/metadata/", bootstrap=pinned)


def test_the_pinned_version_is_the_one_that_is_tested() -> None:
    assert f"tuf=={version('tuf')}" in CONSTRAINTS.read_text().splitlines()


def test_expiry_is_decided_by_the_time_that_was_set(repository: TufRepository, tmp_path: Path) -> None:
    with FolderServer(repository.folder) as server:
        late = updater(repository, server, tmp_path / "late")
        assert trust._set_time(late, repository.now_s + 2 * YEAR_S).year > datetime.now(UTC).year
        with pytest.raises(ExpiredMetadataError):
            late.refresh()
        repository.now_s = time.time() - 2 * YEAR_S
        repository.sign_root()
        repository.sign()
        early = updater(repository, server, tmp_path / "early")
        trust._set_time(early, repository.now_s)
        early.refresh()
        with pytest.raises(ExpiredMetadataError):
            updater(repository, server, tmp_path / "today").refresh()


def test_what_was_verified_is_told_with_who_signed_it(repository: TufRepository, tmp_path: Path) -> None:
    with FolderServer(repository.folder) as server:
        found = updater(repository, server, tmp_path / "device")
        assert set(trust._verified(found)) == {"root"}
        found.get_targetinfo("models/a")
    seen = {item.role: item for item in trust._seen(found, tmp_path / "device")}
    assert set(seen) == {"root", "timestamp", "snapshot", "targets", "team"}
    for role, item in seen.items():
        keyids = {signer.public_key.keyid for signer in repository.signers[role]}
        assert item.signers == keyids
        assert [(set(h.keyids), h.threshold) for h in item.holders] == [(keyids, 1)]
    assert seen["timestamp"].signed_at_s == int(repository.now_s)
    assert trust._timestamp_holders(found) == seen["timestamp"].holders[0]
    # Where the file is not what was verified, all who may sign stand for who did.
    (tmp_path / "device" / "team.json").write_bytes(b"")
    again = {item.role: item for item in trust._seen(found, tmp_path / "device")}
    assert again["team"] == seen["team"]
