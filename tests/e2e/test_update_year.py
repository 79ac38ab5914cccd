"""A device that was off for a year comes back: expired metadata, ten new roots, five versions behind."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_contract.errors import Reason
from tests.support.broker import Mosquitto
from tests.support.device import TENANT, Device
from tests.support.http_registry import FolderServer
from tests.support.models import BundleOnDisk, make_bundle, samples, scores
from tests.support.operator import Operator
from tests.support.tuf_repository import TufRepository
from tests.support.wall_clock import WallClock

DAY_S = 86400
AWAY_DAYS = 370
LIFETIME_S = {"root": 365 * DAY_S, "targets": 90 * DAY_S, "snapshot": 30 * DAY_S, "timestamp": 7 * DAY_S}


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


@pytest.fixture
def repository(tmp_path: Path) -> TufRepository:
    made = TufRepository(tmp_path / "registry", now_s=time.time() - AWAY_DAYS * DAY_S, root_keys=3)
    made.lifetime_s = dict(LIFETIME_S)
    made.sign()
    return made


@pytest.fixture
def device(
    mosquitto: Mosquitto, repository: TufRepository, clock: WallClock
) -> Iterator[tuple[Device, FolderServer]]:
    with FolderServer(repository.folder) as server:
        name = f"box-{uuid.uuid4().hex[:8]}"
        device = Device(name, broker=mosquitto, registry_url=server.url, root=repository.root_path)
        device.environment = clock.environment
        yield device, server
        device.close()


@pytest.mark.parametrize("wakes", ["in 1970", "with a right clock"])
def test_it_updates_by_itself(
    device: tuple[Device, FolderServer],
    mosquitto: Mosquitto,
    repository: TufRepository,
    clock: WallClock,
    tmp_path: Path,
    wakes: str,
) -> None:
    box, _ = device
    bundles = [make_bundle(tmp_path, "tiny", f"{n}.0.0", n, seed=n) for n in range(1, 7)]
    repository.publish(bundles[0])
    clock.shift(-AWAY_DAYS)
    with Operator(mosquitto.host, mosquitto.port, TENANT, box.name, repository.operators[0]) as operator:
        box.start()
        operator.wait_online()
        (model,) = operator.deploy(bundles[0])
        assert model.outcome == "committed", model
    box.stop()

    _a_year_passes(repository, bundles[1:])
    if wakes == "in 1970":
        clock.start_of_1970()
    else:
        clock.right()
    with Operator(mosquitto.host, mosquitto.port, TENANT, box.name, repository.operators[0]) as operator:
        operator.generation = 1  # what it had accepted, a year ago
        operator.desire(bundles[-1])
        box.start()
        model = operator.wait_settled("tiny", timeout_s=60)
        assert (model.outcome, model.version) == ("committed", "6.0.0"), model
        x = samples(4)
        np.testing.assert_allclose(box.scores("tiny", x), scores(x, seed=6), rtol=1e-4)
        behind = box.status()["clock_behind_s"]
        if wakes == "in 1970":
            assert behind > 50 * 365 * DAY_S
            seen = operator.wait(lambda: operator.events("clock"), "a word on the clock")
            assert seen[0].reason is Reason.CLOCK_BEHIND
        else:
            assert behind == 0


def _a_year_passes(repository: TufRepository, bundles: list[BundleOnDisk]) -> None:
    """Five releases, each with two new roots: other keys for root and for one more role each time."""
    now_s = time.time()
    step_s = (now_s - repository.now_s) / len(bundles)
    for turn, bundle in enumerate(bundles):
        repository.now_s += step_s
        repository.rotate("root", count=3, threshold=2)
        repository.rotate(("targets", "snapshot", "timestamp")[turn % 3], count=2, threshold=1 + turn % 2)
        if turn == 2:
            repository.operators = [Ed25519PrivateKey.generate()]
        repository.publish(bundle)
    assert repository.root.version == 11
