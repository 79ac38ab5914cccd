"""Updates as a device lives them: broker, registry, both processes, real models; only executables, wire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_contract.errors import Reason
from edge_contract.manifest import Needs
from tests.e2e.conftest import MakeSite, Site
from tests.support.device import load_on
from tests.support.models import make_bundle, samples, scores
from tests.support.operator import Operator

X = samples(4)


READY = [f"ready-{i}" for i in range(7)]


@pytest.fixture(scope="module")
def site(make_module_site: MakeSite) -> Site:
    """A device that serves version 1.0.0 of several models already, one for each test that wants one."""
    site = make_module_site()
    site.keep = True
    site.install(*(site.publish(name, 1) for name in READY))
    return site


@pytest.fixture(scope="module")
def unused(site: Site) -> Iterator[str]:
    return iter(READY)


@pytest.fixture
def ready(unused: Iterator[str]) -> str:
    """The name of a model of which 1.0.0 serves and was not touched by another test."""
    return next(unused)


@pytest.fixture
def operator(site: Site) -> Operator:
    return site.operator


def assert_serves(site: Site, name: str, seed: int) -> None:
    """The answers are those of the weights of this seed, computed without a runtime."""
    np.testing.assert_allclose(site.device.scores(name, X), scores(X, seed=seed), rtol=1e-4)


def test_install_and_update_under_load_without_a_failed_request(
    site: Site, operator: Operator, ready: str
) -> None:
    v2 = site.publish(ready, 2)
    assert_serves(site, ready, 1)
    with load_on(site.device, ready, X) as load:
        load.wait_for(20)
        (model,) = site.deploy(v2)
        load.wait_for(20)
    assert (model.outcome, model.version, model.previous_version) == ("committed", "2.0.0", "1.0.0")
    assert load.failures == []
    assert load.statuses == {200}
    assert_serves(site, ready, 2)

    status = site.device.model(ready)
    assert status["serves"] == {"version": "2.0.0", "digest": v2.digest}
    assert (status["current"], status["previous"], status["outcome"]) == ("2.0.0", "1.0.0", "committed")
    told = [e.detail.partition(":")[0] for e in operator.events("update") if e.model == ready]
    assert told == ["resolving", "downloading", "preflight", "activating", "probation", "committed"] * 2


def test_two_models_at_once_and_a_removal(site: Site, name: str) -> None:
    one, two = f"{name}-one", f"{name}-two"
    for model in site.deploy(site.publish(one, 1, seed=11), site.publish(two, 1, seed=12)):
        assert model.outcome == "committed"
    assert_serves(site, one, 11)
    assert_serves(site, two, 12)
    site.drop(one)
    assert_serves(site, two, 12)
    assert site.device.infer(one, X).status == 404
    assert one not in [m["name"] for m in site.device.status()["models"]]


def test_rollback_goes_back_and_stays_there(site: Site, operator: Operator, ready: str) -> None:
    v1 = site.wanted[ready]
    site.install(site.publish(ready, 2))
    result = operator.command("rollback", model=ready)
    assert (result.ok, result.data) == (True, {"model": ready, "version": "1.0.0", "digest": v1.digest})
    operator.wait(lambda: (m := operator.model(ready)) and m.outcome == "reverted", "the rollback")
    model = operator.model(ready)
    assert model is not None
    assert (model.version, model.reason) == ("1.0.0", Reason.OPERATOR_ROLLBACK)
    assert_serves(site, ready, 1)
    again = operator.command("rollback", model=ready)
    assert (again.ok, again.reason) == (False, Reason.NO_PREVIOUS)
    unknown = operator.command("rollback", model="nobody")
    assert (unknown.ok, unknown.reason) == (False, Reason.UNKNOWN_MODEL)
    assert operator.command("rollback").reason is Reason.MESSAGE_MALFORMED


def test_a_version_thrown_out_is_tried_again_only_when_an_operator_says_so(
    site: Site, operator: Operator, ready: str
) -> None:
    bad = site.publish(ready, 2, fault="wrong_weights")
    (model,) = site.deploy(bad)
    assert (model.outcome, model.reason, model.version) == ("failed", Reason.GOLDEN_MISMATCH, "1.0.0")
    assert bad.digest in site.state.rejected
    (model,) = site.deploy(bad)
    assert (model.outcome, model.reason) == ("failed", Reason.DIGEST_REJECTED_BEFORE)
    known = len(site.state.rejected)
    assert operator.command("clear-rejected").data == {"cleared": known}
    operator.wait(lambda: site.state.rejected == [], "the empty list")
    (model,) = site.deploy(bad)
    assert (model.outcome, model.reason) == ("failed", Reason.GOLDEN_MISMATCH)
    assert_serves(site, ready, 1)


def test_bench_measures_the_version_that_serves(site: Site, operator: Operator, ready: str) -> None:
    v1 = site.wanted[ready]
    result = operator.command("bench", model=ready, timeout_s=60.0)
    assert result.ok, result
    (measured,) = result.data["results"]
    assert measured["p50_ms"] > 0
    assert measured["sha256"] == v1.manifest.file("model").sha256
    assert operator.command("bench", model="nobody").reason is Reason.UNKNOWN_MODEL


def test_a_registry_that_is_away_is_waited_for(site: Site, ready: str) -> None:
    v2 = site.publish(ready, 2)
    site.server.stop()
    site.desire(v2)
    model = site.wait_state(ready, "waiting")
    assert (model.reason, model.version) == (Reason.REGISTRY_UNREACHABLE, "1.0.0")
    assert_serves(site, ready, 1)
    site.server.start()
    assert site.operator.wait_settled(ready).outcome == "committed"
    assert_serves(site, ready, 2)


def test_a_version_that_is_published_late_is_waited_for(site: Site, name: str, tmp_path: Path) -> None:
    late = make_bundle(tmp_path, name, "1.0.0", 1, seed=1)
    site.desire(late)
    assert site.wait_state(name, "waiting").reason is Reason.NOT_PUBLISHED
    site.registry.publish(late)
    assert site.operator.wait_settled(name).outcome == "committed"


def test_what_this_device_cannot_run_is_not_tried(site: Site, ready: str) -> None:
    greedy = site.publish(ready, 2, needs=Needs(memory_bytes=1 << 40))
    (model,) = site.deploy(greedy)
    assert (model.outcome, model.reason, model.version) == ("failed", Reason.MEMORY_TOO_SMALL, "1.0.0")
    assert greedy.digest not in site.state.rejected


def test_a_newer_wish_ends_a_download(site: Site, ready: str) -> None:
    big, v3 = site.publish(ready, 2, padding_bytes=500_003), site.publish(ready, 3)
    site.server.rate_bytes_per_s = 100_000
    site.desire(big)
    site.wait_state(ready, "downloading")
    site.operator.wait(lambda: (m := site.operator.model(ready)) and m.progress > 0.05, "progress")
    (model,) = site.deploy(v3)
    site.server.rate_bytes_per_s = 0
    assert (model.outcome, model.version, model.previous_version) == ("committed", "3.0.0", "1.0.0")
    assert [p.name for p in site.device.layout.store.iterdir()].count(big.digest) == 0
