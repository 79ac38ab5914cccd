"""Bad versions, each really bad: what the device does with them, and what it says about it."""

from __future__ import annotations

import platform
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from edge_contract import wire
from edge_contract.errors import Reason
from tests.e2e.conftest import MakeSite, Site
from tests.support.device import load_on
from tests.support.models import ABOVE, BundleOnDisk, Fault, samples, scores

X = samples(4)
HOT = X.copy()
HOT[:, 0] = ABOVE
PREFLIGHT: dict[Fault, tuple[Reason, str]] = {
    "wrong_weights": (Reason.GOLDEN_MISMATCH, "preflight: "),
    "garbage": (Reason.LOAD_FAILED, "preflight: "),
    "non_finite": (Reason.NON_FINITE_OUTPUT, "preflight: "),
}
if platform.machine() == "x86_64":  # elsewhere a division does not trap
    PREFLIGHT["crash_at_load"] = (Reason.CANDIDATE_CRASHED, "preflight: the child was killed by SIGFPE")


def assert_serves_v1(site: Site, bundle: BundleOnDisk, seed: int = 1) -> None:
    name = bundle.manifest.name
    np.testing.assert_allclose(site.device.scores(name, X), scores(X, seed=seed), rtol=1e-4)
    status = site.device.model(name)
    assert status["serves"] == {"version": "1.0.0", "digest": bundle.digest}
    assert status["current"] == "1.0.0"


@pytest.fixture(scope="module")
def site(make_module_site: MakeSite) -> Site:
    return make_module_site()


@pytest.fixture(scope="module")
def tried(site: Site) -> dict[Fault, tuple[BundleOnDisk, BundleOnDisk, wire.ModelState]]:
    """One model per fault, all deployed at once: v1, then the bad v2. Fault → (v1, v2, how it ended)."""
    names = {fault: f"f-{fault.replace('_', '-')}" for fault in PREFLIGHT}
    good = {fault: site.publish(name, 1) for fault, name in names.items()}
    bad = {fault: site.publish(name, 2, fault=fault) for fault, name in names.items()}
    site.install(*good.values())
    ended = site.deploy(*bad.values())
    return {f: (good[f], bad[f], model) for f, model in zip(names, ended, strict=True)}


@pytest.mark.parametrize("fault", PREFLIGHT)
def test_preflight_keeps_a_bad_version_out(
    site: Site, tried: dict[Fault, tuple[BundleOnDisk, BundleOnDisk, wire.ModelState]], fault: Fault
) -> None:
    v1, v2, model = tried[fault]
    reason, detail = PREFLIGHT[fault]
    assert (model.outcome, model.reason, model.version) == ("failed", reason, "1.0.0")
    assert model.detail.startswith(detail)
    assert v2.digest in site.state.rejected
    assert not site.device.layout.version(v2.digest).exists()
    events = [e for e in site.operator.events("update") if e.model == model.name and e.version == "2.0.0"]
    assert (events[-1].reason, events[-1].detail) == (reason, f"failed: {model.detail}")
    assert "activating" not in [e.detail for e in events]
    assert_serves_v1(site, v1)


def test_a_candidate_that_hangs_is_killed_at_its_deadline(make_site: MakeSite, name: str) -> None:
    site = make_site(update={"preflight_timeout_s": 2.5})
    v1, hanging = site.publish(name, 1), site.publish(name, 2, fault="hang")
    site.install(v1)
    site.desire(hanging)
    site.wait_state(name, "preflight")
    child = site.device.pid("preflight")
    model = site.operator.wait_settled(name)
    assert (model.outcome, model.reason) == ("failed", Reason.CANDIDATE_HUNG)
    assert not Path(f"/proc/{child}").exists()
    assert_serves_v1(site, v1)


# found out only by those who use it


@pytest.fixture(scope="module")
def used(make_module_site: MakeSite) -> Site:
    """A device whose probation cannot end before as many requests as every finding needs."""
    return make_module_site(
        update={"probation_s": 0.8, "probation_min_requests": 40, "probation_max_s": 25.0}
    )


FOUND: list[dict[Fault, Reason]] = [
    {"skewed_above": Reason.OUTPUT_DRIFT, "error_above": Reason.ERROR_RATE},
    {"slow_above": Reason.LATENCY_REGRESSED},
]
if platform.machine() == "x86_64":
    FOUND.append({"crash_above": Reason.CANDIDATE_CRASHED})


@pytest.mark.parametrize("faults", FOUND, ids="-".join)
def test_use_brings_out_what_preflight_could_not(used: Site, name: str, faults: dict[Fault, Reason]) -> None:
    # Weights whose answer to HOT is not class 0, so that a skew to it is a change.
    seed = next(s for s in range(1, 50) if scores(HOT, seed=s).argmax(axis=1)[0] != 0)
    names = {fault: f"{name}-{fault.replace('_', '-')}" for fault in faults}
    good = [used.publish(name, 1, seed=seed) for name in names.values()]
    bad = [used.publish(name, 2, seed=seed, fault=fault) for fault, name in names.items()]
    used.desire(*good)
    with ExitStack() as stack:
        loads = [stack.enter_context(load_on(used.device, name, HOT)) for name in names.values()]
        for name in names.values():
            assert used.operator.wait_settled(name).outcome == "committed"
        for load in loads:
            load.wait_for(60)  # the version before needs a history to be compared with
        ended = used.deploy(*bad)
        for load in loads:
            load.wait_for(4)  # what was under way
        reverted_s = time.monotonic()
        for load in loads:
            load.wait_for(20)
    found = {fault: model.reason for fault, model in zip(faults, ended, strict=True)}
    assert found == faults
    assert {(model.outcome, model.version) for model in ended} == {("reverted", "1.0.0")}
    assert {status for load in loads for at_s, status in load.answers if at_s > reverted_s} == {200}
    assert {bundle.digest for bundle in bad} <= set(used.state.rejected)
    for bundle in good:
        assert_serves_v1(used, bundle, seed)
