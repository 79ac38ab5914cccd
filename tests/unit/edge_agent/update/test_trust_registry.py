"""The device's trust follows what `edge-fleet registry` signs: rotations, teams, thresholds, hash bins."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_agent.update.trust import Trust
from edge_contract.errors import Reason
from edge_contract.wire import OPERATORS_TARGET
from tests.support.http_registry import FolderServer
from tests.support.registry_folder import RegistryFolder
from tests.support.trust_box import TrustBox

KEYS = ("--root-keys", "3", "--root-threshold", "2")


def box(folder: Path, registry: RegistryFolder, server: FolderServer) -> TrustBox:
    return TrustBox(folder / "box", registry.root, server)


def found(trust: Trust, *names: str) -> bool:
    return all(trust.target(name) is not None for name in names)


def test_the_time_of_signing_is_taken_for_the_floor(tmp_path: Path) -> None:
    registry = RegistryFolder.create(tmp_path)
    with FolderServer(registry.folder) as server:
        device = box(tmp_path, registry, server)
        device.refresh()
        assert abs(device.floor.value.at_s - time.time()) < 60


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_rotations_are_followed_and_what_was_before_stays_refused(tmp_path: Path, role: str) -> None:
    registry = RegistryFolder.create(tmp_path, *KEYS)
    names = registry.publish_many("m", 2)
    with FolderServer(registry.folder) as server:
        device = box(tmp_path, registry, server)
        device.refresh(*names)
        old = registry.copy(tmp_path / "old")
        registry.rotate(role, 2)
        registry.refresh()
        assert found(device.refresh(), *names, OPERATORS_TARGET)
        device.forget_metadata()
        server.folder = old.folder
        device.refused(Reason.TRUST_FAILED)
        server.folder = registry.folder
        assert found(device.refresh(), *names)


def test_a_teams_metadata_and_hash_bins_have_a_floor(tmp_path: Path) -> None:
    registry = RegistryFolder.create(tmp_path)
    registry.delegate("team-*", "vision")
    names = registry.publish_many("m", 300)
    team = registry.publish_many("team-net", 1)
    with FolderServer(registry.folder) as server:
        device = box(tmp_path, registry, server)
        trust = device.refresh()
        assert found(trust, *names[:5], *team)
        roles = set(device.versions())
        assert len(roles) > 5
        assert any("vision" in role for role in roles)
