"""kill -9 in the middle of updates: the device serves old or new, whole, and then completes."""

from __future__ import annotations

import itertools
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest

from tests.e2e.conftest import MakeSite, Site
from tests.support.device import alive, load_on
from tests.support.models import BundleOnDisk, samples, scores
from tests.support.serving import binary_output

X = samples(4)
NAME = "victim"
SLOW_BYTES_PER_S = 150_000


class Victim:
    """One model on one device, with a next version for every test."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._versions = itertools.count(1)
        self.serving = self._publish()
        site.install(self.serving)

    def _publish(self) -> BundleOnDisk:
        version = next(self._versions)
        # Each with a padding of its own, so that there is something to download for a while.
        return self.site.publish(NAME, version, padding_bytes=150_000 + version)

    def send_next(self) -> BundleOnDisk:
        """Order the next version, over a slow network."""
        self.site.server.rate_bytes_per_s = SLOW_BYTES_PER_S
        bundle = self._publish()
        self.site.desire(bundle)
        return bundle

    def reach(self, state: str) -> None:
        """The moment at which the state is reported; for a download, when a part of it is there."""
        self.site.wait_state(NAME, state)
        if state == "downloading":
            self.site.operator.wait(
                lambda: (m := self.site.operator.model(NAME)) and (m.progress > 0.2 or m.state != state),
                "progress",
            )

    def assert_whole(self, *allowed: BundleOnDisk) -> None:
        """The answers are exactly those of one of these versions."""
        answers = self.site.device.scores(NAME, X, timeout_s=10.0)
        seeds = [b.manifest.release for b in allowed]
        assert any(np.allclose(answers, scores(X, seed=seed), rtol=1e-4) for seed in seeds), seeds

    def complete(self, bundle: BundleOnDisk) -> None:
        """The update comes to its end, and all three agree: answers, disk, report."""
        self.site.server.rate_bytes_per_s = 0
        model = self.site.operator.wait_settled(NAME)
        assert (model.outcome, model.digest) == ("committed", bundle.digest), model
        self.assert_whole(bundle)
        status = self.site.device.model(NAME)
        assert status["serves"] == {"version": bundle.manifest.version, "digest": bundle.digest}
        assert (status["current"], status["previous"]) == (
            bundle.manifest.version,
            self.serving.manifest.version,
        )
        stored = {p.name for p in self.site.device.layout.store.iterdir()}
        assert stored == {bundle.digest, self.serving.digest}
        self.serving = bundle


@pytest.fixture(scope="module")
def site(make_module_site: MakeSite) -> Site:
    return make_module_site(update={"probation_s": 1.0})


@pytest.fixture(scope="module")
def victim(site: Site) -> Victim:
    return Victim(site)


@pytest.mark.parametrize("process", ["run", "serve"])
def test_killed_in_one_state_after_the_other(victim: Victim, process: str) -> None:
    """The control process is not missed by callers; of the inference process they notice a pause."""
    device, before = victim.site.device, victim.serving
    inference = device.pid("serve")
    session = victim.site.operator.wait_online().session
    watched = load_on(device, NAME, X, clients=1) if process == "run" else nullcontext()
    with watched as load:
        bundle = victim.send_next()
        for state in ("downloading", "preflight", "probation"):
            victim.reach(state)
            killed = device.kill_one(process)
            victim.assert_whole(before, bundle)  # at once, or as soon as it is up again
            device.pid(process)
            assert not alive(killed)
        victim.complete(bundle)
    if load is not None:
        assert (load.failures, load.statuses) == ([], {200})
        assert device.pid("serve") == inference
        assert victim.site.operator.wait_online().session > session
        blob = victim.site.registry.blob(bundle, "labels").name
        ranges = [seen.range for seen in victim.site.server.seen if seen.path.endswith(blob)]
        assert ranges[0] is None
        assert all(ranges[1:])  # what had come was not asked for again


def test_everything_killed_at_once_and_started_again(victim: Victim) -> None:
    device, before = victim.site.device, victim.serving
    bundle = victim.send_next()
    victim.reach("probation")
    pids = device.pids()
    assert len(pids) >= 3
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    device.kill()
    device.start()
    device.wait_serving()
    victim.assert_whole(before, bundle)
    victim.complete(bundle)


def test_a_killed_inference_process_keeps_callers_waiting_for_moments(victim: Victim) -> None:
    device = victim.site.device
    before = device.pid("serve")
    assert device.kill_one("serve") == before
    answer = device.infer(NAME, X, timeout_s=20.0)  # a new connection, made while nobody serves
    assert answer.status == 200
    np.testing.assert_allclose(
        binary_output(answer), scores(X, seed=victim.serving.manifest.release), rtol=1e-4
    )
    assert device.pid("serve") != before
