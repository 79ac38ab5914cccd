"""Update after update under load, while processes of the device are killed at random.

No answer may be wrong: each is that of the version that served or of the one that was being deployed. Only
between the end of a serving process and the next answers may requests fail; how many did is printed.
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from tests.faults.conftest import Cases
from tests.support.device import Device
from tests.support.models import Array, samples, scores
from tests.support.serving import binary_output
from tests.support.site import MakeSite, Site
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(400)]

CYCLES = 20
# What is killed, in which state of the update: every pair that exists, in an order that is drawn.
MOMENTS = [
    ("run", "downloading"),
    ("run", "preflight"),
    ("run", "activating"),
    ("run", "probation"),
    ("serve", "downloading"),
    ("serve", "preflight"),
    ("serve", "activating"),
    ("serve", "probation"),
    ("fetch", "resolving"),
    ("preflight", "preflight"),
]
X = samples(4)


class Asking:
    """Requests without a pause; each answer is held against those of the versions that may serve now."""

    def __init__(self, device: Device, model: str, clients: int = 2) -> None:
        self._device, self._model = device, model
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]
        self.allowed: dict[int, Array] = {}
        self.answered: list[float] = []
        self.wrong: list[str] = []
        self.failed: list[tuple[float, str]] = []

    def _run(self) -> None:
        while not self._stop.is_set():
            begun_s = time.monotonic()
            try:
                with self._device.client() as client:
                    while not self._stop.is_set():
                        begun_s = time.monotonic()
                        allowed = list(self.allowed.values())
                        answer = client.infer(self._model, X)
                        if answer.status != 200:
                            self.failed.append((begun_s, f"status {answer.status}: {answer.body!r}"))
                            continue
                        found = binary_output(answer)
                        allowed += self.allowed.values()
                        if not any(np.allclose(found, a, rtol=1e-4, atol=1e-6) for a in allowed):
                            self.wrong.append(f"{found.tolist()} with {sorted(self.allowed)}")
                        self.answered.append(time.monotonic())
                        time.sleep(0.002)
            except (OSError, http.client.HTTPException) as e:  # killed before, or in the middle of, an answer
                self.failed.append((begun_s, repr(e)))
                time.sleep(0.02)

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)


def test_twenty_updates_under_load_with_random_kills(make_site: MakeSite, name: str, cases: Cases) -> None:
    chance = random.Random(20261123)
    moments = chance.sample(MOMENTS * (CYCLES // len(MOMENTS)), CYCLES)
    # Each version decides otherwise on purpose, so that an answer tells which one it is of.
    site = make_site(update={"max_drift": 1.0})
    site.install(site.publish(name, 1))
    kills: list[tuple[float, str]] = []
    with Asking(site.device, name) as asking:
        asking.allowed = {1: scores(X, seed=1)}
        for version, (victim, state) in enumerate(moments, 2):
            cases.add(f"{state}, under load", f"kill -9 of {victim}")
            asking.allowed[version] = scores(X, seed=version)
            bundle = site.publish(name, version, padding_bytes=200_000)
            site.server.rate_bytes_per_s = 400_000
            site.desire(bundle)
            kills += kill(site, name, victim, state, chance)
            model = site.operator.wait_settled(name, 60.0)
            assert (model.outcome, model.version) == ("committed", f"{version}.0.0"), (victim, state, model)
            wait_for(lambda: len(asking.answered), "answers")
            del asking.allowed[version - 1]
    print(report(asking, kills))
    assert asking.wrong == []
    assert unexplained(asking, kills) == []
    assert len(kills) >= CYCLES // 2


def kill(site: Site, name: str, victim: str, state: str, chance: random.Random) -> list[tuple[float, str]]:
    """SIGKILL to a process once the update is in that state, or later when that was too short to be seen."""
    order = ["resolving", "downloading", "preflight", "activating", "probation", "idle"]
    later = set(order[order.index(state) :])
    wait_for(
        lambda: (
            (m := site.operator.model(name)) is not None
            and m.state in later
            and (m.state != "idle" or m.target_digest == site.wanted[name].digest)
        ),
        f"{state} of {name}",
    )
    time.sleep(chance.uniform(0, 0.1))
    pids = site.device.pids(victim)
    for pid in pids[:1]:
        at_s = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return [(at_s, victim)]
    return []


def unexplained(asking: Asking, kills: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Failures of requests that were not under way while a killed serving process restarted."""
    windows = []
    for at_s, victim in kills:
        if victim == "serve":
            # The other client's answer may have been written just before: a later one ends the window.
            after = [t for t in asking.answered if t > at_s + 0.05]
            windows.append((at_s - 1.0, min(after, default=at_s) + 0.5))
    return [(t, why) for t, why in asking.failed if not any(a <= t <= b for a, b in windows)]


def report(asking: Asking, kills: list[tuple[float, str]]) -> str:
    victims = {victim: sum(v == victim for _, v in kills) for _, victim in kills}
    return (
        f"{CYCLES} updates, kills {victims}: {len(asking.answered)} requests answered, "
        f"{len(asking.wrong)} wrong, {len(asking.failed)} failed while the serving process restarted"
    )
