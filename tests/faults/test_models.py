"""Models with a valid signature that do everything a model must not, in the real processes of a device.

After each, the version before answers right, `status` says so, and the digest is remembered where the bundle
is at fault.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from edge_agent.inference import InferenceClient
from edge_contract import manifest as m
from edge_contract import wire
from edge_contract.errors import Reason
from tests.faults.conftest import Cases
from tests.support.bad import bad_bundle, let_agents_misbehave
from tests.support.device import load_on
from tests.support.models import BundleOnDisk, make_bundle, samples, scores
from tests.support.site import MakeSite, Site
from tests.support.waiting import wait_for

X = samples(4)
MB = 1 << 20
UPDATE: dict[str, Any] = {
    "preflight_timeout_s": 20.0,
    "preflight_memory_bytes": 384 * MB,
    "preflight_latency_factor": 5.0,
    "preflight_free_bytes": 0,
    "prepared_max_bytes": 0,
    "probation_max_s": 60.0,
}


@pytest.fixture(scope="module")
def misbehaviour() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        let_agents_misbehave(patch)
        yield


@pytest.fixture(scope="module")
def site(make_module_site: MakeSite, misbehaviour: None) -> Site:
    return make_module_site(update=UPDATE, serving={"load_timeout_s": 1.5, "request_timeout_s": 1.0})


@pytest.fixture(autouse=True)
def log(request: pytest.FixtureRequest) -> Iterator[None]:
    """Show what the device wrote during a failed test; the next begins with an empty set."""
    site = request.getfixturevalue("site") if "site" in request.fixturenames else None
    before = len(site.device.log) if site else 0
    yield
    if site:
        print(site.device.log[before:])
        site.wanted.clear()


def publish(site: Site, name: str, version: int, **options: Any) -> BundleOnDisk:
    bundle = bad_bundle(site.folder, name, version, seed=options.pop("seed", version), **options)
    site.registry.publish(bundle)
    return bundle


def assert_serves(site: Site, bundle: BundleOnDisk, seed: int = 1) -> None:
    """By its answers, and by what the device says of itself."""
    name = bundle.manifest.name
    np.testing.assert_allclose(site.device.scores(name, X), scores(X, seed=seed), rtol=1e-4)
    status = site.device.model(name)
    assert status["serves"] == {"version": bundle.manifest.version, "digest": bundle.digest}
    assert (status["current"], status["state"]) == (bundle.manifest.version, "idle")


# found by preflight, so no client ever sees it

PREFLIGHT: dict[str, tuple[dict[str, Any], Reason]] = {
    "aborts at load": ({"fault": "abort", "at": "load"}, Reason.CANDIDATE_CRASHED),
    "aborts in a run": ({"fault": "abort"}, Reason.CANDIDATE_CRASHED),
    "segfaults": ({"fault": "segfault"}, Reason.CANDIDATE_CRASHED),
    "memory bomb at load": ({"fault": "bomb", "at": "load"}, Reason.MEMORY_EXCEEDED),
    "memory bomb in a run": ({"fault": "bomb"}, Reason.MEMORY_EXCEEDED),
    "larger than it says": (
        {"fault": "hold", "at": "load", "amount": 150 * MB},
        Reason.MEMORY_EXCEEDED,
    ),
    "freezes at load": ({"fault": "freeze", "at": "load"}, Reason.CANDIDATE_HUNG),
    "hangs in a run": ({"fault": "hang"}, Reason.CANDIDATE_HUNG),
    "answers NaN": ({"fault": "nan"}, Reason.NON_FINITE_OUTPUT),
    "other answers than in its golden vectors": ({"golden_seed": 77}, Reason.GOLDEN_MISMATCH),
    "60 times slower": ({"fault": "slow", "amount": 60}, Reason.TOO_SLOW),
}


AT_ONCE = ["aborts at load", "memory bomb at load", "other answers than in its golden vectors"]
Tried = dict[str, tuple[BundleOnDisk, BundleOnDisk, wire.ModelState]]


@pytest.fixture(scope="module")
def tried(site: Site) -> Callable[[str], Tried]:
    """One model per fault, those of a group deployed at once: version 1, then the bad version 2."""
    groups = {True: AT_ONCE, False: [fault for fault in PREFLIGHT if fault not in AT_ONCE]}
    done: dict[bool, Tried] = {}

    def ended(fault: str) -> Tried:
        quick = fault in AT_ONCE
        if quick not in done:
            names = {fault: f"p{i}-{quick}".lower() for i, fault in enumerate(groups[quick])}
            good = {fault: publish(site, name, 1) for fault, name in names.items()}
            site.install(*good.values())
            bad = {fault: publish(site, name, 2, **PREFLIGHT[fault][0]) for fault, name in names.items()}
            models = site.deploy(*bad.values(), timeout_s=110.0)
            done[quick] = {f: (good[f], bad[f], model) for f, model in zip(names, models, strict=True)}
        return done[quick]

    return ended


def some_thorough(faults: Iterable[str], quick: Collection[str]) -> list[Any]:
    return [pytest.param(f, marks=[] if f in quick else pytest.mark.thorough) for f in faults]


# The groups one after the other: deploying one removes the other.
@pytest.mark.parametrize("fault", some_thorough(sorted(PREFLIGHT, key=lambda f: f not in AT_ONCE), AT_ONCE))
def test_preflight_is_where_a_bad_model_ends(
    site: Site, tried: Callable[[str], Tried], cases: Cases, fault: str
) -> None:
    cases.add("preflight", f"model {fault}")
    good, bad, model = tried(fault)[fault]
    assert (model.outcome, model.reason, model.version) == ("failed", PREFLIGHT[fault][1], "1.0.0"), model
    assert bad.digest in site.state.rejected
    events = [e for e in site.operator.events("update") if (e.model, e.version) == (model.name, "2.0.0")]
    assert "activating" not in [e.detail for e in events]
    assert good.manifest.name == model.name
    assert_serves(site, good)


def test_another_interface_needs_the_operators_word(site: Site, name: str, cases: Cases) -> None:
    cases.add("preflight", "model changes its interface")
    good = publish(site, name, 1)
    site.install(good)
    other = publish(site, name, 2, classes=5)
    (model,) = site.deploy(other)
    assert (model.outcome, model.reason) == ("failed", Reason.INTERFACE_CHANGED)
    assert "scores FP32 [-1, 4] is now scores FP32 [-1, 5]" in model.detail
    assert other.digest not in site.state.rejected  # nothing is wrong with it
    assert_serves(site, good)

    site.operator.generation += 1
    allowed = wire.DesiredModel(name, "2.0.0", other.digest, allow_interface_change=True)
    payload = site.operator.signed_desired(models=[allowed])
    site.operator.publish(site.operator.topics.desired, payload, retain=True)
    with load_on(site.device, name, X):
        model = site.operator.wait_settled(name)
    assert (model.outcome, model.version) == ("committed", "2.0.0")
    np.testing.assert_allclose(site.device.scores(name, X), scores(X, classes=5, seed=2), rtol=1e-4)


@pytest.mark.thorough
def test_a_candidate_that_somebody_else_kills_is_tried_again(site: Site, name: str, cases: Cases) -> None:
    cases.add("preflight", "kill -9 of the child by somebody else")
    site.install(publish(site, name, 1))
    second = publish(site, name, 2, fault="slow", amount=150, expected=m.Expected(400, 500, 9, 80 * MB, 1.0))
    site.desire(second)
    site.wait_state(name, "preflight")
    killed = site.device.pid("preflight")
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: [p for p in site.device.pids("preflight") if p != killed], "another child")
    assert site.operator.wait_settled(name).outcome == "committed"


# found only by those who use it, or by the process that serves it

WATCHED = m.Probation(probation_s=0.8, probation_min_requests=60, max_memory_growth_bytes=16 * MB)
PROBATION: dict[str, tuple[dict[str, Any], set[Reason]]] = {
    "aborts after activation": ({"fault": "abort", "after": 20}, {Reason.CANDIDATE_CRASHED}),
    "answers NaN after activation": ({"fault": "nan", "after": 20}, {Reason.NON_FINITE_OUTPUT}),
    "leaks after activation": ({"fault": "leak", "amount": MB}, {Reason.MEMORY_LEAK}),
    "20 times slower after activation": ({"fault": "slow", "amount": 40}, {Reason.LATENCY_REGRESSED}),
    "hangs after activation": ({"fault": "hang", "after": 5}, {Reason.ERROR_RATE}),
    "aborts while it is activated": ({"fault": "abort", "at": "load"}, {Reason.CANDIDATE_CRASHED}),
    "freezes after activation": ({"fault": "freeze", "after": 5}, {Reason.CANDIDATE_CRASHED}),
    "freezes while it is activated": ({"fault": "freeze", "at": "load"}, {Reason.CANDIDATE_CRASHED}),
}


@pytest.mark.parametrize("fault", some_thorough(PROBATION, ["aborts after activation"]))
def test_a_model_that_is_bad_only_where_it_serves_is_reverted(
    site: Site, name: str, cases: Cases, fault: str
) -> None:
    cases.add("activation" if "while" in fault else "probation", f"model {fault}")
    recipe, reasons = PROBATION[fault]
    good = publish(site, name, 1)
    site.install(good)
    bad = publish(site, name, 2, where="serve", probation=WATCHED, **recipe)
    with load_on(site.device, name, X) as load:
        load.wait_for(100)  # a history to be compared with
        (model,) = site.deploy(bad, timeout_s=60.0)
    assert (model.outcome, model.version) == ("reverted", "1.0.0")
    assert model.reason in reasons, model
    assert bad.digest in site.state.rejected
    # After a hang of all its workers the process is started again.
    wait_for(lambda: _answers(site, name), "answers")
    assert_serves(site, good)


@pytest.mark.parametrize("fault", some_thorough(["abort", "freeze"], ["abort"]))
def test_a_model_that_does_not_start_is_passed_over(site: Site, name: str, cases: Cases, fault: str) -> None:
    """It was committed, and is bad only at the next start of the serving process."""
    cases.add("start of the serving process", f"model that was committed: {fault}")
    good, bad = publish(site, name, 1), publish(site, name, 2, where="start", at="load", fault=fault)
    site.install(good)
    site.install(bad)
    site.device.kill_one("serve")
    model = wait_for(
        lambda: (m := site.operator.model(name)) and m.outcome == "reverted" and m, "the revert", timeout_s=40
    )
    assert (model.version, model.reason) == ("1.0.0", Reason.FAILED_STARTS)
    assert bad.digest not in site.state.rejected  # power cuts look the same from here
    # After a hang of all its workers the process is started again.
    wait_for(lambda: _answers(site, name), "answers")
    assert_serves(site, good)


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["abort", "freeze"])
def test_without_a_control_process_the_version_before_serves_all_the_same(
    make_site: MakeSite, misbehaviour: None, name: str, cases: Cases, fault: str
) -> None:
    """Only the serving process is ever started again, as systemd does it: it counts its starts by itself."""
    cases.add("start of the serving process, no control process", f"model that was committed: {fault}")
    site = make_site(update=UPDATE, serving={"load_timeout_s": 1.0})
    good, bad = publish(site, name, 1), publish(site, name, 2, where="start", at="load", fault=fault)
    site.install(good)
    site.install(bad)
    device = site.device
    device.stop()
    ends = 0
    while ends < 10:
        device.start("serve")
        assert device.process is not None
        if wait_for(
            lambda: _answers(site, name) or device.process.poll() is not None, "an end or an answer"
        ) and (device.process.poll() is None):
            break
        ends += 1
    assert ends == device.config.serving.max_failed_starts
    np.testing.assert_allclose(device.scores(name, X), scores(X, seed=1), rtol=1e-4)
    status = device.model(name)
    assert status["serves"] == {"version": "1.0.0", "digest": good.digest}
    assert status["current"] == "2.0.0"  # nobody but the control process writes links


def _answers(site: Site, name: str) -> bool:
    with suppress(OSError):
        return site.device.infer(name, X, 2.0).status == 200
    return False


# the device's own form


@pytest.mark.parametrize("damage", some_thorough(["flip", "cut", "gone"], ["flip"]))
def test_a_damaged_form_is_passed_over_and_made_again(
    prepared_site: Site, name: str, cases: Cases, damage: str
) -> None:
    cases.add("prepared form", damage)
    site = prepared_site
    bundle = make_bundle(site.folder, name, features=64, classes=32, seed=3)
    site.registry.publish(bundle)
    site.install(bundle)
    assert form_of(site, name) == "prepared"
    (weights,) = (site.device.layout.prepared / bundle.digest).glob("*/weights.bin")
    whole = weights.read_bytes()
    weights.unlink()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :]
    damaged = flipped if damage == "flip" else whole[:middle]
    if damage != "gone":
        weights.write_bytes(damaged)
    restart(site)
    assert form_of(site, name) == "original"
    x = samples(4, features=64)
    answer = site.device.scores(name, x)
    np.testing.assert_allclose(answer, scores(x, features=64, classes=32, seed=3), rtol=1e-3, atol=1e-6)

    made = site.device.layout.prepared / bundle.digest
    wait_for(lambda: any(p.read_bytes() != damaged for p in made.glob("*/weights.bin")), "the form")
    wait_for(lambda: not site.device.pids("preflight"), "the end of its making")
    restart(site)
    assert form_of(site, name) == "prepared"


@pytest.fixture(scope="module")
def prepared_site(make_module_site: MakeSite) -> Site:
    return make_module_site(update={"probation_s": 0.2})


def restart(site: Site) -> None:
    site.device.kill_one("serve")
    site.device.wait_serving()


def form_of(site: Site, name: str) -> str:
    return next(
        e.form for e in InferenceClient(site.device.layout.control_socket).index(5.0) if e.name == name
    )
