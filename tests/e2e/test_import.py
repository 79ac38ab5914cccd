"""A USB stick in place of the network: the real commands, the real agent, and no registry anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edge_contract.errors import Reason
from tests.e2e.conftest import MakeSite, Site
from tests.support.device import TENANT
from tests.support.models import BundleOnDisk, samples, scores
from tests.support.waiting import wait_for

X = samples(4)


def stick(site: Site, folder: Path, *bundles: BundleOnDisk, generation: int = 0) -> Path:
    options = ["--tenant", TENANT, "--desire", site.device.name] if generation else []
    options += ["--generation", str(generation)] if generation else []
    return site.registry.export(folder / f"stick-{generation}.tar", *bundles, options=options)


def import_(site: Site, medium: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "edge_agent", "import", "--config", str(site.device.config_path)]
    done = subprocess.run([*command, str(medium), "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def wait_serves(site: Site, bundle: BundleOnDisk) -> None:
    name = bundle.manifest.name

    def look() -> bool:
        models = {m["name"]: m for m in site.device.status()["models"]}
        return name in models and models[name]["outcome"] == "committed"

    wait_for(look, f"{name}@{bundle.manifest.version} to be committed", timeout_s=40)
    assert site.device.model(name)["serves"]["digest"] == bundle.digest


def test_a_device_that_never_saw_a_network_is_served_by_hand(
    make_site: MakeSite, tmp_path: Path, name: str
) -> None:
    site = make_site(start="")
    site.server.stop()
    v1, v2 = site.publish(name, 1), site.publish(name, 2)
    # Before its first start: the order waits for the control process.
    assert import_(site, stick(site, tmp_path, v1, generation=5))["generation"] == 5
    site.device.start()
    site.device.wait_serving()
    wait_serves(site, v1)
    np.testing.assert_allclose(site.device.scores(name, X), scores(X, seed=1), rtol=1e-4)
    # While it runs.
    import_(site, stick(site, tmp_path, v2, generation=6))
    wait_for(lambda: site.device.model(name)["current"] == "2.0.0", "the second version", timeout_s=40)
    wait_serves(site, v2)
    # An old stick, found in a drawer, changes nothing.
    import_(site, stick(site, tmp_path, v1, generation=4))
    refused = site.operator.wait(lambda: site.state.refused, "the refusal")
    assert f"[{Reason.STALE_GENERATION.value}]" in refused
    wait_serves(site, v2)


def test_blobs_by_hand_end_the_wait_for_a_registry_that_is_away(
    make_site: MakeSite, tmp_path: Path, name: str
) -> None:
    site = make_site(update={"retry_s": 3600.0})
    v1, v2 = site.publish(name, 1), site.publish(name, 2)
    site.install(v1)
    site.server.stop()
    site.desire(v2)
    assert site.wait_state(name, "waiting").reason is Reason.REGISTRY_UNREACHABLE
    assert import_(site, stick(site, tmp_path, v2))["generation"] is None
    assert site.operator.wait_settled(name, 40).outcome == "committed"
    wait_serves(site, v2)
