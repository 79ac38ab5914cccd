"""Clocks of 1970, ten years ahead, and that jump during an update.

What may not be believed is not believed by any clock; what is refused because of a clock is taken once the
clock is right; what waits does not wait for decades.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_contract import wire
from edge_contract.errors import Reason
from tests.faults.conftest import Cases
from tests.support.broker import Mosquitto
from tests.support.device import TENANT, Device
from tests.support.http_registry import FolderServer
from tests.support.models import BundleOnDisk, make_bundle
from tests.support.operator import DAY_MS, Operator, now_ms
from tests.support.registry_folder import RegistryFolder
from tests.support.trust_box import TrustBox
from tests.support.tuf_repository import YEAR_S, TufRepository
from tests.support.wall_clock import WallClock

DAY_S = 86400
FAR_MS = now_ms() + 30 * 365 * DAY_MS
# A size and a rate that make a download last for some seconds.
PADDING_BYTES, RATE_BYTES_PER_S = 400_000, 150_000


# --- metadata alone, in this process: each clock against an honest and a frozen registry ---

CLOCKS: dict[str, float] = {
    "1970": -1.0,
    "a year behind": -YEAR_S,
    "a day behind": -DAY_S,
    "right": 0,
    "ten years ahead": 10 * YEAR_S,
}


@pytest.fixture
def repository(tmp_path: Path) -> TufRepository:
    made = TufRepository(tmp_path / "registry")
    made.lifetime_s |= {"timestamp": 7 * DAY_S, "snapshot": 30 * DAY_S}
    made.sign()
    return made


@pytest.fixture
def box(tmp_path: Path, repository: TufRepository) -> Iterator[TrustBox]:
    with FolderServer(repository.folder) as server:
        yield TrustBox(tmp_path / "box", repository.root_path, server)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("lost", ["nothing", "all local metadata"])
def test_a_clock_lets_nothing_freeze_and_poisons_nothing(
    box: TrustBox, repository: TufRepository, cases: Cases, clock: str, lost: str
) -> None:
    cases.add("refresh", f"clock {clock}, {lost} lost")
    box.refresh()
    repository.now_s += 60 * DAY_S
    repository.sign()
    box.clock_s = repository.now_s
    box.refresh()
    before = box.floor.value
    box.clock_s = 10.0 if clock == "1970" else repository.now_s + CLOCKS[clock]
    if lost != "nothing":
        box.forget_metadata()
    if clock == "ten years ahead":
        assert "clock says" in box.refused(Reason.TRUST_EXPIRED).what
    else:
        box.refresh()
    assert box.floor.value.time == before.time
    # Somebody holds back what is new, and then shows what expired long ago under a higher version.
    repository.now_s -= 50 * DAY_S
    repository.sign()
    box.refused(Reason.TRUST_EXPIRED)
    assert box.floor.value.time == before.time
    repository.now_s += 51 * DAY_S
    repository.sign()
    box.clock_s = repository.now_s
    box.refresh()
    assert box.floor.value.at_s == int(repository.now_s)


def test_a_clock_that_jumps_from_refresh_to_refresh(
    box: TrustBox, repository: TufRepository, cases: Cases
) -> None:
    right_s = box.clock_s
    for turn, clock in enumerate([*CLOCKS, *reversed(CLOCKS)]):
        cases.add("refresh", f"jump {turn} to {clock}")
        repository.sign()
        box.clock_s = 10.0 if clock == "1970" else right_s + CLOCKS[clock]
        if clock == "ten years ahead":
            box.refused(Reason.TRUST_EXPIRED)
        else:
            box.refresh()
            assert box.versions()["timestamp"] == repository.timestamp.version
        assert box.floor.value.at_s == int(right_s)


# --- a whole device, its processes by a clock that is set while they run ---


class Post:
    """A device, its clock, its operator and its registry; models of rising version."""

    def __init__(self, folder: Path, mosquitto: Mosquitto, name: str) -> None:
        self.folder, self.name = folder, name
        self.clock = WallClock(folder)
        self.registry = RegistryFolder.create(folder / "r")
        self.server = FolderServer(self.registry.folder)
        self.server.start()
        self.device = Device(name, broker=mosquitto, registry_url=self.server.url, root=self.registry.root)
        self.device.environment = self.clock.environment
        self.operator = Operator(mosquitto.host, mosquitto.port, TENANT, name, self.registry.operator_key)
        self.version = 0

    def bundle(self) -> BundleOnDisk:
        """The next version, published."""
        self.version += 1
        number = self.version
        made = make_bundle(
            self.folder, "tiny", f"{number}.0.0", number, seed=number, padding_bytes=PADDING_BYTES + number
        )
        self.registry.publish(made)
        return made

    def wait_state(self, *states: str) -> wire.ModelState:
        """Until the model is reported in one of these."""

        def look() -> wire.ModelState | None:
            model = self.operator.model("tiny")
            return model if model is not None and model.state in states else None

        found = self.operator.wait(look, f"state {states}")
        assert found is not None
        return found

    def assert_commits(self, bundle: BundleOnDisk) -> None:
        """The attempt under way ends well."""
        model = self.operator.wait_settled("tiny", timeout_s=60)
        assert (model.outcome, model.version) == ("committed", bundle.manifest.version), model

    def close(self) -> None:
        """End everything."""
        self.operator.__exit__(None, None, None)
        print(self.device.log)
        self.device.close()
        self.server.stop()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    folder = tmp_path_factory.mktemp("clock")
    with Mosquitto(folder / "broker") as mosquitto:
        post = Post(folder, mosquitto, f"clock-{time.time_ns() % 10**9}")
        with post.operator:
            post.device.start()
            post.operator.wait_online()
            first = post.bundle()
            post.operator.desire(first)
            post.assert_commits(first)
            yield post
        post.close()


@pytest.fixture
def post(running: Post) -> Iterator[Post]:
    yield running
    running.clock.right()
    running.server.rate_bytes_per_s = 0


def refusals(post: Post, reason: Reason) -> int:
    return sum(event.reason is reason for event in post.operator.events("refused"))


def test_a_clock_of_1970_believes_no_expired_order(post: Post, cases: Cases) -> None:
    cases.add("command", "clock 1970")
    post.clock.start_of_1970()
    post.operator.wait(lambda: post.operator.events("clock"), "a word on the clock")
    assert post.operator.events("clock")[-1].reason is Reason.CLOCK_BEHIND
    before = refusals(post, Reason.EXPIRED)
    expired = post.operator.signed_command("status", "late", {}, expires_ms=now_ms() - DAY_MS)
    post.operator.publish(post.operator.topics.command, expired)
    post.operator.wait(lambda: refusals(post, Reason.EXPIRED) > before, "the refusal")
    assert post.operator.command("status").ok
    cases.add("desired state", "clock 1970")
    post.operator.generation += 1
    stale = post.operator.signed_desired(expires_ms=now_ms() - DAY_MS)
    post.operator.publish(post.operator.topics.desired, stale)
    post.operator.wait(lambda: post.operator.state and post.operator.state.refused, "the refusal")
    assert post.operator.state is not None
    assert "[expired]" in post.operator.state.refused
    cases.add("update", "clock 1970")
    bundle = post.bundle()
    post.operator.desire(bundle)
    post.assert_commits(bundle)
    assert post.device.status()["clock_behind_s"] > 50 * YEAR_S
    post.clock.right()
    post.operator.wait(
        lambda: post.operator.events("clock")[-1].reason is Reason.OK, "a word on the clock that is right"
    )


def test_a_clock_ten_years_ahead_is_named_and_waited_for(post: Post, cases: Cases) -> None:
    post.clock.shift(3650)
    cases.add("command", "clock ten years ahead")
    before = refusals(post, Reason.EXPIRED)
    post.operator.publish(post.operator.topics.command, post.operator.signed_command("status", "now", {}))
    post.operator.wait(lambda: refusals(post, Reason.EXPIRED) > before, "the refusal")
    assert "check the device's clock" in post.operator.events("refused")[-1].detail
    cases.add("update", "clock ten years ahead")
    bundle = post.bundle()
    post.operator.desire(bundle, expires_ms=FAR_MS)
    model = post.wait_state("waiting")
    assert (model.reason, model.version) == (Reason.TRUST_EXPIRED, f"{post.version - 1}.0.0")
    assert "this device's clock says 2036" in model.detail
    post.clock.right()
    post.assert_commits(bundle)


JUMPS: dict[str, Callable[[WallClock], None]] = {
    "to 1970": WallClock.start_of_1970,
    "ten years ahead": lambda clock: clock.shift(3650),
    "a day back": lambda clock: clock.shift(-1),
}


@pytest.mark.thorough
@pytest.mark.parametrize("state", ["waiting", "downloading", "preflight", "probation"])
@pytest.mark.parametrize("jump", JUMPS)
def test_a_clock_that_jumps_during_an_update(post: Post, cases: Cases, state: str, jump: str) -> None:
    """It jumps there in the middle of a state, and back again in the next one."""
    cases.add(state, f"clock jumps {jump}")
    bundle = post.bundle()
    post.server.rate_bytes_per_s = RATE_BYTES_PER_S
    if state == "waiting":
        post.server.stop()
    post.operator.desire(bundle, expires_ms=FAR_MS)
    post.wait_state(state)
    JUMPS[jump](post.clock)
    if state == "waiting":
        post.server.start()
    if jump == "ten years ahead" and state == "waiting":
        post.operator.wait(
            lambda: (
                (post.operator.model("tiny") or wire.ModelState("tiny", "idle")).reason
                is Reason.TRUST_EXPIRED
            ),
            "the clock's refusal",
        )
        post.clock.right()
    post.assert_commits(bundle)
    post.clock.right()
    assert post.operator.command("status").ok
