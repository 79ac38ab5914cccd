"""One model's machine at work, and all models together: real store, journal and control socket.

Only the two children (fetch, preflight) are scripted jobs; theirs are test_fetch.py and the serving tests.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_agent import files, verified
from edge_agent.config import Config, Update
from edge_agent.inference import Loaded
from edge_agent.layout import Layout
from edge_agent.update import jobs, journal, reload, trials
from edge_agent.update.changes import Step
from edge_agent.update.floor import order_floor
from edge_agent.update.journal import Entry, Ref
from edge_agent.update.machine import CANCELLABLE, Event, State
from edge_agent.update.recheck import Found
from edge_agent.update.rejected import Rejected
from edge_agent.update.store import Store
from edge_agent.update.updater import Updater
from edge_contract import wire
from edge_contract.errors import MessageRejected, Reason, StorageFault
from tests.support.control_double import InferenceDouble
from tests.support.models import BundleOnDisk, install, make_bundle
from tests.support.waiting import wait_for

CONFIG = Update(
    probation_s=0.001, probation_min_requests=0, probation_max_s=5.0, retry_s=0.05, max_attempts=3
)
PAST_MS = 1


class Script:
    """What the two children do: steps by digest, taken one list a start; by default all goes well."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.bundles: dict[str, BundleOnDisk] = {}
        self.fetch: dict[str, list[list[Step]]] = {}
        self.preflight: dict[str, list[list[Step]]] = {}
        self.started: list[tuple[str, str]] = []
        self.cancelled: list[str] = []

    def next(self, script: dict[str, list[list[Step]]], digest: str, good: list[Step]) -> list[Step]:
        """The steps of this start; the last list serves all later starts."""
        lists = script.get(digest, [good])
        return list(lists.pop(0) if len(lists) > 1 else lists[0])

    def publish(self, bundle: BundleOnDisk) -> Ref:
        self.bundles[bundle.digest] = bundle
        return Ref(bundle.manifest.version, bundle.digest)


class ScriptedJob:
    def __init__(self, script: Script, kind: str, digest: str, steps: list[Step]) -> None:
        self.progress = 0.5
        self._script, self._steps, self._kind = script, steps, kind
        script.started.append((kind, digest))

    def poll(self, now_ms: int) -> list[Step]:
        steps, self._steps = self._steps, []
        return steps

    def cancel(self) -> None:
        self._script.cancelled.append(self._kind)


class Agent:
    """The updates of one device. `restart` is what a kill -9 and a new process come to."""

    def __init__(self, layout: Layout, config: Config, script: Script, double: InferenceDouble) -> None:
        self.layout, self.config, self.script, self.double = layout, config, script, double
        self.events: list[wire.Event] = []
        self.generation = 0
        self.ahead_ms = 0
        self.updater: Updater = None  # type: ignore[assignment]
        self.restart()

    def restart(self) -> None:
        if self.updater is not None:
            for driver in self.updater._drivers.values():
                if driver._job is not None:  # it dies with its parent, which writes nothing any more
                    driver._job.cancel()
        self.updater = Updater(Path("agent.toml"), self.config, self.events.append, self.now_ms())

    def end(self) -> None:
        if self.updater is not None:
            self.updater.stop()

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms

    def look(self) -> None:
        """Let probation look at the counts, which it does twice a second."""
        self.updater.tick(self.now_ms())
        self.ahead_ms += 600
        self.updater.tick(self.now_ms())

    def want(self, *, downgrade: bool = False, **models: Ref) -> None:
        self.generation += 1
        desired = [
            wire.DesiredModel(name, ref.version, ref.digest, allow_downgrade=downgrade)
            for name, ref in models.items()
        ]
        message = wire.Desired(1, "t", "d", self.generation, 0, 10**15, desired)
        self.updater.accept(message, self.now_ms())

    def view(self, name: str = "tiny") -> wire.ModelState:
        found = {view.name: view for view in self.updater.views()}
        return found[name]

    def run_until(self, done: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not done():
            views = self.updater.views()
            assert time.monotonic() < deadline_s, f"waited in vain for {what}; now {views}"
            self.updater.tick(self.now_ms())
            time.sleep(0.002)

    def run_until_settled(self, name: str = "tiny") -> wire.ModelState:
        self.run_until(
            lambda: self.view(name).state == "idle" and self.view(name).outcome != "none", "an outcome"
        )
        return self.view(name)

    def deploy(self, ref: Ref, *, downgrade: bool = False) -> wire.ModelState:
        self.want(downgrade=downgrade, tiny=ref)
        self.run_until(
            lambda: journal.load(self.layout, "tiny", 0)[0].settled_generation == self.generation,
            f"the end of {ref.version}",
        )
        return self.view()

    def on_disk(self) -> tuple[Ref | None, Ref | None]:
        store = Store(self.layout)
        return store.current("tiny"), store.previous("tiny")

    def stored(self) -> set[str]:
        return {p.name for p in self.layout.store.iterdir()}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[BundleOnDisk]:
    folder = tmp_path_factory.mktemp("bundles")
    return [make_bundle(folder, version=f"{n}.0.0", release=n, seed=n) for n in (1, 2, 3)]


@pytest.fixture
def layout() -> Iterator[Layout]:
    with tempfile.TemporaryDirectory(prefix="ew-") as folder:
        yield Layout(Config(tenant="t", device="d", state_dir=f"{folder}/state", run_dir=f"{folder}/run"))


@pytest.fixture
def double(layout: Layout) -> Iterator[InferenceDouble]:
    with InferenceDouble(layout) as double:
        yield double


@pytest.fixture
def agent(
    layout: Layout,
    double: InferenceDouble,
    bundles: list[BundleOnDisk],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Agent]:
    script = Script(layout)
    for bundle in bundles:
        script.publish(bundle)

    class Fetch(ScriptedJob):
        def __init__(
            self,
            config_path: Path,
            name: str,
            target: Ref,
            rejected: Rejected,
            min_release: int,
            deadline_s: float,
        ) -> None:
            assert deadline_s == 21600.0

            refusal = jobs._rejected_before(target, rejected)
            if script.bundles[target.digest].manifest.release < min_release:
                refusal = Step(Event.UNFIT, Reason.ROLLBACK_REFUSED, f"below {min_release}")
            good = [Step(Event.RESOLVED), Step(Event.FETCHED)]
            steps = [refusal] if refusal else script.next(script.fetch, target.digest, good)
            if Step(Event.FETCHED) in steps:
                install(script.bundles[target.digest], layout, None)
            super().__init__(script, "fetch", target.digest, steps)

    class Preflight(ScriptedJob):
        def __init__(self, entry: Entry, layout: Layout, store: Store, config: Update) -> None:
            assert entry.target is not None
            digest = entry.target.digest
            super().__init__(
                script, "preflight", digest, script.next(script.preflight, digest, [Step(Event.PASSED)])
            )

    monkeypatch.setattr(jobs, "FetchJob", Fetch)
    monkeypatch.setattr(trials, "PreflightJob", Preflight)
    monkeypatch.setattr(jobs, "_PAUSE_S", 0.02)
    monkeypatch.setattr(trials, "_LOOK_EVERY_MS", 2)
    config = Config(
        tenant="t", device="d", state_dir=str(layout.state), run_dir=str(layout.run), update=CONFIG
    )
    agent = Agent(layout, config, script, double)
    yield agent
    agent.end()


@pytest.fixture
def refs(bundles: list[BundleOnDisk]) -> list[Ref]:
    return [Ref(b.manifest.version, b.digest) for b in bundles]


# the good case


def test_the_first_version_and_the_next(agent: Agent, refs: list[Ref], double: InferenceDouble) -> None:
    v1, v2, v3 = refs
    view = agent.deploy(v1)
    assert (view.outcome, view.version, view.previous_version) == ("committed", "1.0.0", None)
    assert agent.on_disk() == (v1, None)
    view = agent.deploy(v2)
    assert (view.outcome, view.version, view.previous_version) == ("committed", "2.0.0", "1.0.0")
    agent.deploy(v3)
    assert agent.on_disk() == (v3, v2)
    assert agent.stored() == {v3.digest, v2.digest}  # two generations stay
    assert list(dict.fromkeys(digest for _, _, digest in double.calls)) == [r.digest for r in refs]
    states = [e.detail.partition(":")[0] for e in agent.events if e.version == "2.0.0"]
    assert states == ["resolving", "downloading", "preflight", "activating", "probation", "committed"]


def test_the_version_that_serves_already_is_not_touched(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    agent.deploy(refs[0])
    agent.script.started.clear()
    double.calls.clear()
    agent.want(tiny=refs[0])
    agent.run_until_settled()
    assert (agent.script.started, double.calls) == ([], [])
    assert agent.view().outcome == "committed"


def test_a_model_that_is_not_wanted_any_more_is_removed(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    agent.deploy(refs[0])
    agent.deploy(refs[1])
    agent.want()
    agent.run_until(lambda: not agent.updater.views(), "the removal")
    assert double.loaded == {}
    assert agent.on_disk() == (None, None)
    assert agent.stored() == set()
    assert journal.names(agent.layout) == []
    assert [e.detail for e in agent.events if e.kind == "update"][-1].startswith("removed")


def test_models_go_their_own_ways(agent: Agent, refs: list[Ref], tmp_path: Path) -> None:
    other = agent.script.publish(make_bundle(tmp_path, name="other"))
    bad = agent.script.publish(make_bundle(tmp_path, name="bad"))
    agent.script.preflight[bad.digest] = [[Step(Event.REJECTED, Reason.GOLDEN_MISMATCH, "wrong")]]
    agent.want(tiny=refs[0], other=other, bad=bad)
    outcomes = {name: agent.run_until_settled(name).outcome for name in ("tiny", "other", "bad")}
    assert outcomes == {"tiny": "committed", "other": "committed", "bad": "failed"}
    agent.want(tiny=refs[1], other=other)
    agent.run_until(lambda: {v.name for v in agent.updater.views()} == {"tiny", "other"}, "removal of bad")
    agent.run_until(lambda: agent.view().version == "2.0.0", "the update of tiny")
    assert agent.view("other").version == "1.0.0"


# a kill in every state


def frozen_in(state: State, agent: Agent, refs: list[Ref]) -> Entry:
    """What the journal says when the process is killed in `state` on the way from v1 to v2."""
    return Entry(
        schema=1,
        name="tiny",
        state=state,
        generation=2,
        settled_generation=1,
        target=refs[1],
        base=refs[0],
        older=None,
        attempts=1,
        retry_at_ms=PAST_MS,
        probation_since_ms=PAST_MS,
        reason=Reason.OUTPUT_DRIFT if state is State.REVERTING else Reason.OK,
    )


@pytest.mark.parametrize("effects", ["none of its effects", "all of its effects"])
@pytest.mark.parametrize("state", State)
def test_killed_in_a_state_it_goes_on_to_the_end(
    agent: Agent,
    refs: list[Ref],
    bundles: list[BundleOnDisk],
    double: InferenceDouble,
    state: State,
    effects: str,
) -> None:
    """Killed before and after the work of the state: either way the end is one version, whole."""
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.want(tiny=v2)
    journal.save(agent.layout, frozen_in(state, agent, refs))
    if state in (State.PREFLIGHT, State.ACTIVATING, State.PROBATION, State.REVERTING):
        install(bundles[1], agent.layout, None)
    store = Store(agent.layout)
    if (state, effects) in {
        (State.ACTIVATING, "all of its effects"),
        (State.PROBATION, "none of its effects"),
        (State.PROBATION, "all of its effects"),
        (State.REVERTING, "none of its effects"),
    }:
        store.point("tiny", v2, v1)
        double.loaded["tiny"] = v2.digest
    agent.restart()
    if state is not State.IDLE:
        assert agent.view().state == state.value  # until the first tick it is what was
    serving = agent.on_disk()[0]
    assert serving is not None
    assert store.has(serving.digest)
    agent.run_until(lambda: agent.view().outcome != "none" and agent.view().state == "idle", "the end")
    wanted = v1 if state is State.REVERTING else v2
    assert agent.on_disk()[0] == wanted
    assert double.loaded == {"tiny": wanted.digest}
    assert agent.view().outcome == ("reverted" if state is State.REVERTING else "committed")
    assert store.has(wanted.digest)


def test_killed_again_and_again_in_activation_it_gives_up(
    agent: Agent, refs: list[Ref], bundles: list[BundleOnDisk], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.want(tiny=v2)
    journal.save(agent.layout, frozen_in(State.ACTIVATING, agent, refs))
    install(bundles[1], agent.layout, None)
    double.load_s = 100.0  # never comes to an end: a kill would end it
    for _ in range(CONFIG.max_attempts - 1):
        agent.restart()
        agent.updater.tick(agent.now_ms())
        assert agent.view().state == "activating"
    # The threads of the agents that were "killed" still live here; what they ask for must not happen.
    double.refuse[v2.digest] = (422, Reason.LOAD_FAILED)
    double.load_s = 0.0
    agent.restart()
    view = agent.run_until_settled()
    assert (view.outcome, view.reason) == ("reverted", Reason.FAILED_STARTS)
    assert agent.on_disk()[0] == v1


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b'{"schema":1}'])
def test_a_damaged_journal_stops_nothing(agent: Agent, refs: list[Ref], damage: bytes) -> None:
    agent.deploy(refs[0])
    agent.layout.journal_file("tiny").write_bytes(damage)
    agent.restart()
    assert agent.view().version == "1.0.0"
    assert [e.reason for e in agent.events if e.kind == "storage"] == [Reason.STORAGE_FAULT]
    assert agent.deploy(refs[1]).outcome == "committed"


def test_a_damaged_desired_state_changes_nothing_that_serves(agent: Agent, refs: list[Ref]) -> None:
    agent.deploy(refs[0])
    agent.layout.desired.write_bytes(b"{}")
    agent.restart()
    assert (agent.updater.adopted, agent.updater.generation) == (0, 1)
    for _ in range(20):
        agent.updater.tick(agent.now_ms())
    assert (agent.view().version, agent.view().state) == ("1.0.0", "idle")
    assert any("set aside" in e.detail for e in agent.events)
    agent.restart()
    assert agent.deploy(refs[1]).outcome == "committed"


def test_what_a_kill_left_in_the_store_is_collected_at_the_next_start(
    agent: Agent, refs: list[Ref], bundles: list[BundleOnDisk]
) -> None:
    agent.deploy(refs[0])
    install(bundles[2], agent.layout, None)
    agent.restart()
    assert agent.stored() == {refs[0].digest}


# older releases and older orders


@pytest.fixture
def releases(tmp_path: Path, agent: Agent) -> list[Ref]:
    made = [make_bundle(tmp_path, version=f"{n}.0.0", release=n, seed=n) for n in (4, 5, 6)]
    return [agent.script.publish(bundle) for bundle in made]


def floor(agent: Agent) -> int:
    return order_floor(agent.layout).value.releases.get("tiny", 0)


def test_an_older_release_is_refused_unless_the_operator_allows_it(agent: Agent, releases: list[Ref]) -> None:
    v4, v5, v6 = releases
    agent.deploy(v4)
    agent.deploy(v6)
    for _ in range(2):
        view = agent.deploy(v5)
        assert (view.outcome, view.reason, view.version) == ("failed", Reason.ROLLBACK_REFUSED, "6.0.0")
        agent.restart()
    assert agent.updater.rejected.digests() == []
    assert agent.deploy(v5, downgrade=True).version == "5.0.0"
    # It was allowed once: what this device has committed stays the measure.
    assert floor(agent) == 6
    assert agent.deploy(v4).reason is Reason.ROLLBACK_REFUSED
    assert agent.deploy(v5).outcome == "committed"  # it is what serves
    assert agent.deploy(v6).version == "6.0.0"


def test_only_a_commit_raises_the_floor(agent: Agent, releases: list[Ref]) -> None:
    v4, v5, v6 = releases
    agent.deploy(v4)
    agent.script.preflight[v6.digest] = [[Step(Event.REJECTED, Reason.GOLDEN_MISMATCH, "wrong")]]
    assert agent.deploy(v6).outcome == "failed"
    assert floor(agent) == 4
    assert agent.deploy(v5).outcome == "committed"
    assert floor(agent) == 5


def test_a_rollback_is_no_downgrade_and_what_it_went_back_to_can_be_deployed(
    agent: Agent, releases: list[Ref]
) -> None:
    v4, v5, _ = releases
    agent.deploy(v4)
    agent.deploy(v5)
    agent.updater.rollback("tiny", agent.now_ms())
    agent.run_until(lambda: agent.view().version == "4.0.0" and agent.view().state == "idle", "rollback")
    assert floor(agent) == 5
    agent.restart()
    assert floor(agent) == 5
    assert agent.deploy(v4).outcome == "committed"
    agent.updater.rejected.clear()
    assert agent.deploy(v5).outcome == "committed"


def test_a_lost_floor_is_taken_from_what_serves_and_was_accepted(agent: Agent, releases: list[Ref]) -> None:
    agent.deploy(releases[1])
    for path in agent.layout.floor_copies("orders"):
        path.write_bytes(b"")
    agent.restart()
    assert any("orders.floor is damaged" in e.detail for e in agent.events)
    value = order_floor(agent.layout).value
    assert (value.generation, value.releases) == (agent.generation, {"tiny": 5})
    assert agent.deploy(releases[0]).reason is Reason.ROLLBACK_REFUSED


def test_a_lost_desired_state_does_not_make_older_ones_acceptable(agent: Agent, releases: list[Ref]) -> None:
    agent.deploy(releases[0])
    agent.deploy(releases[1])
    agent.layout.desired.unlink()
    agent.restart()
    assert agent.updater.adopted == 0
    assert agent.updater.generation == agent.generation


# what goes wrong on the way


@pytest.mark.parametrize(
    ("reason", "remembered"),
    [
        (Reason.GOLDEN_MISMATCH, True),
        (Reason.LOAD_FAILED, True),
        (Reason.MANIFEST_INVALID, True),
        (Reason.CANDIDATE_CRASHED, True),
        (Reason.DIGEST_MISMATCH, False),  # somebody altered the registry's files: the bundle may be fine
        (Reason.TRUST_FAILED, False),
    ],
)
def test_a_bundle_at_fault_is_never_tried_again(
    agent: Agent, refs: list[Ref], reason: Reason, remembered: bool
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.script.fetch[v2.digest] = [
        [Step(Event.RESOLVED), Step(Event.REJECTED, reason, "what was wrong")],
        [Step(Event.RESOLVED), Step(Event.FETCHED)],
    ]
    view = agent.deploy(v2)
    assert (view.outcome, view.reason, view.detail) == ("failed", reason, "what was wrong")
    assert (view.version, agent.on_disk()[0]) == ("1.0.0", v1)
    assert agent.updater.rejected.digests() == ([v2.digest] if remembered else [])
    view = agent.deploy(v2)
    if remembered:
        assert (view.outcome, view.reason) == ("failed", Reason.DIGEST_REJECTED_BEFORE)
        assert "what was wrong" in view.detail
        agent.updater.rejected.clear()
        agent.restart()
        view = agent.deploy(v2)
    assert view.outcome == "committed"


def test_one_generation_is_tried_once(agent: Agent, refs: list[Ref]) -> None:
    agent.script.preflight[refs[0].digest] = [[Step(Event.UNFIT, Reason.MEMORY_TOO_SMALL, "too small")]]
    agent.deploy(refs[0])
    started = len(agent.script.started)
    for _ in range(2):
        for _ in range(20):
            agent.updater.tick(agent.now_ms())
        agent.restart()
    assert len(agent.script.started) == started
    assert agent.updater.rejected.digests() == []
    agent.want(tiny=refs[0])  # the operator says it once more
    agent.run_until(lambda: len(agent.script.started) > started, "another attempt")


def test_interruptions_are_waited_out(agent: Agent, refs: list[Ref]) -> None:
    trouble = Step(Event.INTERRUPTED, Reason.REGISTRY_UNREACHABLE, "nobody there")
    good = [Step(Event.RESOLVED), Step(Event.FETCHED)]
    agent.script.fetch[refs[0].digest] = [[trouble], [Step(Event.RESOLVED), trouble], good]
    agent.want(tiny=refs[0])
    agent.run_until(lambda: agent.view().state == "waiting", "the pause")
    assert (agent.view().reason, agent.view().outcome) == (Reason.REGISTRY_UNREACHABLE, "none")
    assert agent.run_until_settled().outcome == "committed"
    assert [kind for kind, _ in agent.script.started].count("fetch") == 3


def test_interruptions_exhaust_nothing(agent: Agent, refs: list[Ref]) -> None:
    agent.config = replace(agent.config, update=replace(CONFIG, retry_max_s=0.05))
    agent.restart()
    trouble = Step(Event.INTERRUPTED, Reason.DISK_FULL, "no space")
    good = [Step(Event.RESOLVED), Step(Event.FETCHED)]
    agent.script.fetch[refs[0].digest] = [*[[trouble]] * 12, good]
    agent.want(tiny=refs[0])
    agent.run_until(lambda: "interruption 12," in agent.view().detail, "the twelfth")
    assert (agent.view().state, agent.view().reason) == ("waiting", Reason.DISK_FULL)
    assert agent.run_until_settled().outcome == "committed"


def test_a_clock_that_is_set_ends_no_pause_and_hangs_none(
    agent: Agent, refs: list[Ref], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.update.driver.random.random", lambda: 1.0)
    trouble = Step(Event.INTERRUPTED, Reason.REGISTRY_UNREACHABLE, "nobody there")
    agent.script.fetch[refs[0].digest] = [[trouble], [Step(Event.RESOLVED), Step(Event.FETCHED)]]
    agent.config = replace(agent.config, update=replace(CONFIG, retry_s=3000.0))
    agent.restart()
    agent.want(tiny=refs[0])
    agent.run_until(lambda: agent.view().state == "waiting", "the pause")
    agent.updater.tick(agent.now_ms())  # the pause runs
    for years in (56, -10):
        agent.ahead_ms = years * 365 * 86_400_000
        for _ in range(10):
            agent.updater.tick(agent.now_ms())
        assert agent.view().state == "waiting"
    agent.restart()  # ten years ago, says the clock now: nobody knows how long the pause was
    assert agent.run_until_settled().outcome == "committed"


def test_a_pause_goes_on_after_a_restart(agent: Agent, refs: list[Ref]) -> None:
    trouble = Step(Event.INTERRUPTED, Reason.REGISTRY_UNREACHABLE, "nobody there")
    agent.script.fetch[refs[0].digest] = [[trouble], [Step(Event.RESOLVED), Step(Event.FETCHED)]]
    agent.want(tiny=refs[0])
    agent.run_until(lambda: agent.view().state == "waiting", "the pause")
    agent.restart()
    assert agent.view().state == "waiting"
    assert agent.run_until_settled().outcome == "committed"


@pytest.mark.parametrize("state", sorted(CANCELLABLE))
def test_a_newer_wish_drops_what_is_under_way(agent: Agent, refs: list[Ref], state: State) -> None:
    v1, v2, v3 = refs
    agent.deploy(v1)
    stays: dict[State, list[Step]] = {
        State.WAITING: [Step(Event.INTERRUPTED, Reason.REGISTRY_UNREACHABLE)],
        State.RESOLVING: [],
        State.DOWNLOADING: [Step(Event.RESOLVED)],
        State.PREFLIGHT: [Step(Event.RESOLVED), Step(Event.FETCHED)],
    }
    agent.script.fetch[v2.digest] = [stays[state]]
    agent.script.preflight[v2.digest] = [[]]
    if state is State.WAITING:
        agent.config = replace(agent.config, update=replace(CONFIG, retry_s=60.0))
        agent.restart()
    agent.want(tiny=v2)
    agent.run_until(lambda: agent.view().state == state.value, state.value)
    agent.updater.tick(agent.now_ms())  # so that the job of the state runs
    agent.script.cancelled.clear()
    assert agent.deploy(v3).outcome == "committed"
    assert agent.on_disk() == (v3, v1)
    kind = {State.WAITING: [], State.PREFLIGHT: ["preflight"]}.get(state, ["fetch"])
    assert agent.script.cancelled == kind
    assert v2.digest not in agent.stored()


def test_going_back_to_what_serves_is_no_update(agent: Agent, refs: list[Ref]) -> None:
    agent.deploy(refs[0])
    agent.script.started.clear()
    agent.script.fetch[refs[1].digest] = [[]]
    agent.want(tiny=refs[1])
    agent.run_until(lambda: agent.view().state == "resolving", "resolving")
    view = agent.deploy(refs[0])
    assert (view.outcome, view.version) == ("committed", "1.0.0")
    assert agent.script.started == [("fetch", refs[1].digest)]


def test_a_probation_is_not_cut_short_by_a_newer_wish(agent: Agent, refs: list[Ref]) -> None:
    v1, v2, v3 = refs
    agent.deploy(v1)
    agent.config = replace(agent.config, update=replace(CONFIG, probation_s=0.7))
    agent.restart()
    agent.want(tiny=v2)
    agent.run_until(lambda: agent.view().state == "probation", "probation")
    agent.want(tiny=v3)
    agent.run_until(lambda: agent.view().version == "3.0.0", "the newer one")
    assert agent.on_disk() == (v3, v2)  # v2 had its time, and was kept


# activation and probation


def test_activation_waits_for_an_inference_process_that_restarts(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    double.stop()
    agent.want(tiny=refs[0])
    agent.run_until(lambda: agent.view().state == "activating", "activation")
    for _ in range(30):
        agent.updater.tick(agent.now_ms())
    assert agent.view().state == "activating"
    double.start()
    assert agent.run_until_settled().outcome == "committed"


def test_the_disk_names_the_new_version_only_when_it_has_loaded(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    double.load_s = 0.3
    agent.want(tiny=v2)
    agent.run_until(lambda: ("load", "tiny", v2.digest) in double.calls, "the load")
    assert agent.on_disk() == (v1, None)
    agent.run_until(lambda: agent.view().state == "probation", "the activation")
    assert agent.on_disk() == (v2, v1)


def test_an_inference_process_that_falls_over_between_load_and_link_serves_the_new_version(
    agent: Agent, refs: list[Ref], double: InferenceDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    real = Store.point

    def point(self: Store, name: str, current: Ref | None, previous: Ref | None) -> None:
        double.loaded["tiny"] = v1.digest  # a new process: it serves what the disk says at this moment
        real(self, name, current, previous)

    monkeypatch.setattr(Store, "point", point)
    assert agent.deploy(v2).outcome == "committed"
    assert double.loaded == {"tiny": v2.digest}


@pytest.mark.parametrize(
    ("status", "reason", "remembered"),
    [
        (422, Reason.LOAD_FAILED, True),
        (501, Reason.RUNTIME_MISSING, False),
    ],
)
def test_a_version_that_does_not_load_is_reverted(
    agent: Agent, refs: list[Ref], double: InferenceDouble, status: int, reason: Reason, remembered: bool
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    double.refuse[v2.digest] = (status, reason)
    view = agent.deploy(v2)
    assert (view.outcome, view.reason, view.version) == ("reverted", reason, "1.0.0")
    assert "activation: it does not" in view.detail
    assert double.loaded == {"tiny": v1.digest}
    assert agent.updater.rejected.digests() == ([v2.digest] if remembered else [])


@pytest.mark.parametrize("trouble", [(507, Reason.STORAGE_FAULT), (422, Reason.DIGEST_MISMATCH)])
def test_a_disk_in_the_way_of_an_activation_is_waited_for(
    agent: Agent, refs: list[Ref], double: InferenceDouble, trouble: tuple[int, Reason]
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    double.refuse[v2.digest] = trouble
    agent.want(tiny=v2)
    agent.run_until(lambda: agent.view().state == "waiting", "the pause")
    assert (agent.view().reason, agent.on_disk()[0], double.loaded) == (trouble[1], v1, {"tiny": v1.digest})
    double.refuse.clear()
    assert agent.run_until_settled().outcome == "committed"
    assert agent.on_disk() == (v2, v1)


def test_a_store_that_cannot_keep_a_version_whole_ends_the_attempt(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    double.refuse[v2.digest] = (404, Reason.NOT_FOUND)
    view = agent.deploy(v2)
    assert (view.outcome, view.reason, view.version) == ("reverted", Reason.NOT_FOUND, "1.0.0")
    assert f"given up after {CONFIG.max_attempts} attempts" in view.detail
    assert agent.updater.rejected.digests() == []


def test_a_link_that_cannot_be_swapped_is_no_fault_of_the_version(
    agent: Agent, refs: list[Ref], double: InferenceDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    real, faults = files.swap_link, [1, 1]

    def swap(link: Path, target: str) -> None:
        if faults:
            faults.pop()
            raise StorageFault(Reason.STORAGE_FAULT, "input/output error", "look at the disk")
        real(link, target)

    monkeypatch.setattr(files, "swap_link", swap)
    assert agent.deploy(v2).outcome == "committed"
    assert double.loaded == {"tiny": v2.digest}


def probation(agent: Agent, ref: Ref, **limits: float) -> None:
    """Bring `ref` into a probation that only a finding or a minute ends."""
    agent.config = replace(
        agent.config, update=replace(CONFIG, probation_s=60.0, probation_max_s=90.0, **limits)
    )
    agent.restart()
    agent.want(tiny=ref)
    agent.run_until(lambda: agent.view().state == "probation", "probation")


def test_a_finding_in_probation_reverts_and_is_remembered(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    probation(agent, v2)
    assert agent.on_disk() == (v2, v1)
    double.count(v2.digest, 100, errors=50)
    view = agent.run_until_settled()
    assert (view.outcome, view.reason, view.version) == ("reverted", Reason.ERROR_RATE, "1.0.0")
    assert agent.on_disk() == (v1, None)
    assert double.loaded == {"tiny": v1.digest}
    assert agent.updater.rejected.digests() == [v2.digest]
    assert agent.stored() == {v1.digest}


def test_a_first_version_that_is_bad_leaves_nothing_behind(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    probation(agent, refs[0])
    double.count(refs[0].digest, 100, non_finite=1)
    view = agent.run_until_settled()
    assert (view.outcome, view.reason, view.version) == ("reverted", Reason.NON_FINITE_OUTPUT, None)
    assert (double.loaded, agent.on_disk(), agent.stored()) == ({}, (None, None), set())


def test_latency_is_compared_with_the_version_before(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    double.count(v1.digest, 200)  # a millisecond each
    probation(agent, v2)
    double.count(v2.digest, 200)
    double.counts[v2.digest].latency_counts[15] = 0
    double.counts[v2.digest].latency_counts[40] = 200
    assert agent.run_until_settled().reason is Reason.LATENCY_REGRESSED


def test_the_baseline_survives_a_restart(agent: Agent, refs: list[Ref], double: InferenceDouble) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    double.count(v1.digest, 200)
    probation(agent, v2)
    agent.restart()
    double.counts.pop(v1.digest)
    double.count(v2.digest, 200)
    double.counts[v2.digest].latency_counts[15] = 0
    double.counts[v2.digest].latency_counts[40] = 200
    assert agent.run_until_settled().reason is Reason.LATENCY_REGRESSED


def test_counts_of_an_inference_process_that_restarted_are_added(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    probation(agent, v2, max_error_rate=0.1, probation_min_requests=1000)
    double.count(v2.digest, 40, errors=2)
    agent.look()
    double.restart()
    double.count(v2.digest, 40, errors=2)
    agent.look()
    assert agent.view().state == "probation"  # 4 of 80
    double.count(v2.digest, 50, errors=12)
    view = agent.run_until_settled()  # 14 of 90
    assert "14 of 90 requests failed" in view.detail


def test_an_inference_process_that_never_lives_long_enough_to_answer_reverts(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    """Under load a candidate may kill its process within milliseconds, at every start."""
    v1, v2 = refs[:2]
    agent.deploy(v1)
    probation(agent, v2)
    double.instead["/edgeward/v1/stats"] = (503, b"")
    for _ in range(2):
        agent.look()
        double.restart()
    view = agent.run_until_settled()
    assert (view.outcome, view.reason) == ("reverted", Reason.CANDIDATE_CRASHED)
    assert agent.updater.rejected.digests() == [v2.digest]


def test_an_inference_process_that_falls_over_twice_reverts(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    probation(agent, v2)
    for _ in range(2):
        agent.look()
        double.restart()
    assert agent.run_until_settled().reason is Reason.CANDIDATE_CRASHED
    assert agent.on_disk()[0] == v1


@pytest.mark.parametrize("reason", [Reason.FAILED_STARTS, Reason.LOAD_FAILED])
@pytest.mark.parametrize("state", ["idle", "probation"])
def test_what_the_inference_process_fell_back_to_becomes_the_truth(
    agent: Agent, refs: list[Ref], double: InferenceDouble, state: str, reason: Reason
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    if state == "probation":
        probation(agent, v2)
    else:
        agent.deploy(v2)
    double.loaded["tiny"] = v1.digest
    loaded = [Loaded("tiny", "1.0.0", v1.digest, True, reason)]
    agent.updater.notice(loaded, agent.now_ms())
    agent.updater.notice(loaded, agent.now_ms())
    agent.run_until(lambda: agent.view().outcome == "reverted", "the revert")
    assert (agent.view().reason, agent.on_disk()[0]) == (reason, v1)
    agent.updater.notice(loaded, agent.now_ms())
    for _ in range(5):
        agent.updater.tick(agent.now_ms())
    assert agent.view().state == "idle"


def test_what_serves_as_it_should_is_no_fall_back(agent: Agent, refs: list[Ref]) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.deploy(v2)
    agent.updater.notice([Loaded("tiny", "2.0.0", v2.digest, True, Reason.OK)], agent.now_ms())
    agent.updater.notice([Loaded("tiny", "1.0.0", v1.digest, True, Reason.OK)], agent.now_ms())
    agent.updater.notice([Loaded("tiny", "1.0.0", v1.digest, False, Reason.LOAD_FAILED)], agent.now_ms())
    agent.updater.notice([Loaded("stranger", "1.0.0", v1.digest, True, Reason.LOAD_FAILED)], agent.now_ms())
    agent.updater.tick(agent.now_ms())
    assert agent.view().state == "idle"
    assert agent.on_disk()[0] == v2


def test_a_committed_version_that_power_cuts_struck_out_can_be_deployed_again(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.deploy(v2)
    double.loaded["tiny"] = v1.digest
    loaded = [Loaded("tiny", "1.0.0", v1.digest, True, Reason.FAILED_STARTS)]
    agent.updater.notice(loaded, agent.now_ms())
    agent.run_until(lambda: agent.view().outcome == "reverted", "the revert")
    assert agent.updater.rejected.digests() == []
    assert agent.deploy(v2).outcome == "committed"


def test_a_version_in_probation_that_does_not_start_is_thrown_out(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    probation(agent, v2)
    double.loaded["tiny"] = v1.digest
    loaded = [Loaded("tiny", "1.0.0", v1.digest, True, Reason.FAILED_STARTS)]
    agent.updater.notice(loaded, agent.now_ms())
    agent.run_until(lambda: agent.view().outcome == "reverted", "the revert")
    assert agent.updater.rejected.digests() == [v2.digest]


@pytest.mark.parametrize("known", [True, False])
def test_what_is_not_loaded_is_reported_and_asked_for(
    agent: Agent, refs: list[Ref], double: InferenceDouble, known: bool
) -> None:
    """By growing pauses, and at once when it is deployed again."""
    v1 = refs[0]
    agent.deploy(v1)
    missing = Loaded("tiny", "", v1.digest, False, Reason.FAILED_STARTS, "", "did not survive 3 starts")
    double.loaded.clear()
    double.refuse[v1.digest] = (503, Reason.MODEL_NOT_READY)
    asked = len(double.calls)

    def notice() -> None:
        agent.updater.notice([missing] if known else [], agent.now_ms())

    def ended() -> bool:
        thread = agent.updater._reload._thread
        return thread is not None and not thread.is_alive()

    notice()
    view = agent.view()
    reason = Reason.FAILED_STARTS if known else Reason.MODEL_NOT_READY
    assert (view.state, view.outcome, view.reason) == ("idle", "committed", reason)
    assert view.detail.startswith("1.0.0 is not loaded")
    assert ("did not survive" in view.detail) is known
    assert [e.reason for e in agent.events if e.kind == "serving"] == [reason]
    wait_for(ended, "the end of the first request")
    for _ in range(3):
        notice()
    assert len(double.calls) == asked + 1
    assert len([e for e in agent.events if e.kind == "serving"]) == 1
    double.refuse.clear()
    assert agent.deploy(v1).reason == reason  # nothing serves yet
    notice()
    wait_for(lambda: double.loaded == {"tiny": v1.digest}, "the load")
    agent.updater.notice([Loaded("tiny", "1.0.0", v1.digest, True, Reason.OK)], agent.now_ms())
    assert (agent.view().outcome, agent.view().reason, agent.view().detail) == ("committed", Reason.OK, "")


def test_a_form_that_has_decayed_is_dropped_and_the_original_loaded(
    agent: Agent, refs: list[Ref], double: InferenceDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the first request is refused; another form may then be made."""
    v1 = refs[0]
    agent.deploy(v1)
    updater = agent.updater
    double.forms["tiny"] = "prepared"
    form = agent.layout.prepared / v1.digest / "key"
    form.mkdir(parents=True)
    updater._remake._tried.add(v1.digest)
    found = iter([[Found(v1.digest, True, "the prepared form is damaged", 0.0, form=True)]])
    monkeypatch.setattr(updater._recheck, "poll", lambda *_: next(found, []))
    monkeypatch.setattr(reload, "_PAUSE_S", 0.0)
    double.refuse[v1.digest] = (501, Reason.MEMORY_TOO_SMALL)
    asked = len(double.calls)
    updater.tick(agent.now_ms())

    def notice(done: Callable[[], bool]) -> bool:
        updater.notice(updater._tools.inference.index(), agent.now_ms())
        return done()

    wait_for(lambda: notice(lambda: len(double.calls) > asked), "the first request")
    assert not form.exists()
    assert any("prepared form is damaged" in e.detail for e in agent.events)
    double.refuse.clear()
    wait_for(lambda: notice(lambda: double.forms["tiny"] == "original"), "the original")
    wait_for(lambda: notice(lambda: v1.digest in updater._remake._tried), "another form to be made")
    assert updater._reload._decayed == set()


def test_a_model_that_is_removed_is_not_missed(agent: Agent, refs: list[Ref]) -> None:
    agent.deploy(refs[0])
    agent.want()
    agent.run_until(lambda: not agent.updater.views(), "its removal")
    agent.updater.notice([], agent.now_ms())
    assert [e for e in agent.events if e.kind == "serving"] == []


# what the disk loses


def settle(agent: Agent, ticks: int = 30) -> None:
    for _ in range(ticks):
        agent.updater.tick(agent.now_ms())
        time.sleep(0.002)


def flip(path: Path) -> None:
    """Change one bit as a disk does: nothing else tells."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "damage", ["flipped bit", "cut", "zeroed", "manifest gone", "folder gone", "link gone", "link dangling"]
)
@pytest.mark.parametrize("before", [1, 2])
def test_what_serves_and_is_not_whole_on_the_disk_is_fetched_again(
    agent: Agent, refs: list[Ref], double: InferenceDouble, damage: str, before: int
) -> None:
    for ref in refs[:before]:
        agent.deploy(ref)
    serving = refs[before - 1]
    store, on_disk = Store(agent.layout), agent.on_disk()
    model = agent.layout.version(serving.digest) / "model.onnx"
    verified.check(agent.layout, serving.digest, agent.now_ms())
    agent.script.started.clear()
    match damage:
        case "flipped bit":
            flip(model)
            agent.layout.verified(serving.digest).unlink()  # the look that is due would have found it
        case "cut":
            model.write_bytes(model.read_bytes()[:-1])
        case "zeroed":
            model.write_bytes(bytes(model.stat().st_size))
        case "manifest gone":
            (model.parent / "manifest.json").unlink()
        case "folder gone":
            files.remove_tree(model.parent)
        case "link gone":
            agent.layout.current("tiny").unlink()
        case "link dangling":
            files.swap_link(agent.layout.current("tiny"), f"../../store/{'0' * 64}")
    agent.restart()
    agent.run_until(lambda: ("fetch", serving.digest) in agent.script.started, "the repair")
    assert agent.run_until_settled().outcome == "committed"
    assert store.has(serving.digest)
    assert agent.on_disk() == on_disk
    assert double.loaded == {"tiny": serving.digest}
    settle(agent)
    assert agent.script.started.count(("fetch", serving.digest)) == 1


def test_a_repair_waits_for_the_registry_and_a_newer_wish_goes_before_it(
    agent: Agent, refs: list[Ref]
) -> None:
    v1, v2, v3 = refs
    agent.deploy(v1)
    agent.deploy(v2)
    files.remove_tree(agent.layout.version(v2.digest))
    agent.script.fetch[v2.digest] = [[Step(Event.INTERRUPTED, Reason.REGISTRY_UNREACHABLE, "nobody there")]]
    agent.restart()
    agent.run_until(lambda: agent.view().state == "waiting", "the repair")
    settle(agent)
    assert agent.view().state in ("waiting", "resolving")
    assert agent.deploy(v3).outcome == "committed"
    assert agent.on_disk()[0] == v3


def test_what_cannot_be_repaired_makes_place_for_the_version_before(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.deploy(v2)
    agent.script.preflight[v2.digest] = [[Step(Event.REJECTED, Reason.LOAD_FAILED, "it does not")]]
    double.loaded["tiny"] = v1.digest  # it fell back by itself
    loaded = [Loaded("tiny", "1.0.0", v1.digest, True, Reason.DIGEST_MISMATCH)]
    agent.updater.notice(loaded, agent.now_ms())
    agent.run_until(lambda: agent.view().outcome == "failed", "the end of the repair")
    assert agent.view().reason is Reason.LOAD_FAILED
    agent.updater.notice(loaded, agent.now_ms())
    agent.run_until(lambda: agent.view().outcome == "reverted", "the version before")
    assert agent.on_disk()[0] == v1


def test_a_version_that_the_inference_process_finds_damaged_is_fetched_again(
    agent: Agent, refs: list[Ref], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.deploy(v2)
    double.loaded["tiny"] = v1.digest
    loaded = [Loaded("tiny", "1.0.0", v1.digest, True, Reason.DIGEST_MISMATCH)]
    agent.script.started.clear()
    for _ in range(3):
        agent.updater.notice(loaded, agent.now_ms())
    agent.run_until(lambda: agent.script.started, "the repair")
    assert agent.run_until_settled().outcome == "committed"
    assert (agent.on_disk(), double.loaded) == ((v2, v1), {"tiny": v2.digest})


def test_a_damaged_version_before_is_let_go_and_told(agent: Agent, refs: list[Ref]) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.deploy(v2)
    (agent.layout.version(v1.digest) / "model.onnx").write_bytes(b"")
    agent.restart()
    agent.run_until(lambda: agent.view().previous_version is None, "the end of the way back")
    assert any("no way back any more" in e.detail for e in agent.events)
    assert agent.on_disk() == (v2, None)


def test_a_probation_whose_link_is_lost_activates_again(
    agent: Agent, refs: list[Ref], bundles: list[BundleOnDisk], double: InferenceDouble
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.want(tiny=v2)
    journal.save(agent.layout, frozen_in(State.PROBATION, agent, refs))
    install(bundles[1], agent.layout, None)
    agent.restart()
    assert agent.run_until_settled().outcome == "committed"
    assert (agent.on_disk(), double.loaded) == ((v2, v1), {"tiny": v2.digest})


@pytest.mark.parametrize("which", ["current", "previous"])
def test_a_link_that_cannot_be_read_is_not_a_link_that_is_not_there(
    agent: Agent, refs: list[Ref], double: InferenceDouble, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    v1, v2, v3 = refs
    agent.deploy(v1)
    agent.deploy(v2)
    real, broken = os.readlink, [True]

    def readlink(path: Path) -> str:
        if broken[0] and Path(path).name == which:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(os, "readlink", readlink)
    monkeypatch.setattr("edge_agent.update.driver._STORAGE_PAUSE_S", 0.005)
    monkeypatch.setattr("edge_agent.update.updater._STORAGE_PAUSE_S", 0.005)
    double.calls.clear()
    agent.restart()
    agent.want(tiny=v3)
    settle(agent)
    assert agent.view().reason is Reason.STORAGE_FAULT
    assert "Input/output error" in agent.view().detail
    assert double.calls == []
    assert {v1.digest, v2.digest} <= agent.stored()
    with pytest.raises(MessageRejected):
        agent.updater.rollback("tiny", agent.now_ms())
    broken[0] = False
    agent.run_until(lambda: agent.view().version == "3.0.0" and agent.view().state == "idle", "the update")
    assert agent.on_disk() == (v3, v2)


def test_a_journal_that_cannot_be_read_holds_up_no_other_model(
    agent: Agent, refs: list[Ref], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = agent.script.publish(make_bundle(tmp_path, name="other"))
    agent.want(tiny=refs[0], other=other)
    agent.run_until_settled("tiny")
    agent.run_until_settled("other")
    real, broken = files.read, [True]

    def read(path: Path) -> bytes | None:
        if broken[0] and path == agent.layout.journal_file("tiny"):
            raise StorageFault(Reason.STORAGE_FAULT, f"{path}: input/output error", "check the disk")
        return real(path)

    monkeypatch.setattr(files, "read", read)
    monkeypatch.setattr("edge_agent.update.updater._STORAGE_PAUSE_S", 0.005)
    install(agent.script.bundles[refs[2].digest], agent.layout, None)  # rubbish, for all anybody knows
    agent.restart()
    agent.want(tiny=refs[1])
    agent.run_until(lambda: "other" not in [v.name for v in agent.updater.views()], "the removal of other")
    assert (agent.view().state, agent.view().reason) == ("idle", Reason.STORAGE_FAULT)
    assert {refs[0].digest, refs[2].digest} <= agent.stored()  # nothing is removed meanwhile
    broken[0] = False
    agent.run_until(lambda: agent.view().version == "2.0.0" and agent.view().state == "idle", "the update")


def test_a_disk_that_takes_nothing_keeps_nobody_from_starting_and_is_asked_again(
    agent: Agent, refs: list[Ref], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.deploy(refs[0])
    agent.layout.desired.write_bytes(b"damaged")
    agent.layout.journal_file("tiny").write_bytes(b"damaged")
    broken = [True]
    for name in (
        "write",
        "move",
        "swap_link",
        "remove_tree",
        "make_folder",
        "remove_link",
        "remove_leftovers",
    ):
        real = getattr(files, name)

        def guarded(*args: object, real: Callable[..., object] = real) -> object:
            if broken[0]:
                raise StorageFault(Reason.STORAGE_FAULT, "read-only file system", "repair it")
            return real(*args)

        monkeypatch.setattr(files, name, guarded)
    monkeypatch.setattr("edge_agent.update.driver._STORAGE_PAUSE_S", 0.005)
    monkeypatch.setattr("edge_agent.update.updater._STORAGE_PAUSE_S", 0.005)
    agent.restart()
    agent.want(tiny=refs[1])
    settle(agent)
    assert (agent.view().version, agent.view().state) == ("1.0.0", "idle")
    assert agent.updater.adopted == 0
    assert any("cannot be set aside" in e.detail for e in agent.events)
    broken[0] = False
    agent.run_until(lambda: agent.view().version == "2.0.0" and agent.view().state == "idle", "the update")
    assert agent.updater.adopted == agent.generation


def test_a_rollback_is_in_the_journal_before_it_is_answered(
    agent: Agent, refs: list[Ref], monkeypatch: pytest.MonkeyPatch
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.deploy(v2)
    real, broken = journal.save, [True]

    def save(layout: Layout, entry: Entry) -> None:
        if broken[0]:
            raise StorageFault(Reason.DISK_FULL, "no space", "free some")
        real(layout, entry)

    monkeypatch.setattr(journal, "save", save)
    with pytest.raises(StorageFault):
        agent.updater.rollback("tiny", agent.now_ms())
    settle(agent)
    assert agent.on_disk() == (v2, v1)  # it was refused, so it does not happen later
    broken[0] = False
    agent.updater.rollback("tiny", agent.now_ms())
    assert journal.load(agent.layout, "tiny", 0)[0].state is State.REVERTING
    agent.restart()  # killed before anything else
    agent.run_until(lambda: agent.view().outcome == "reverted", "the rollback")
    assert agent.on_disk() == (v1, None)


# rollback


def test_a_file_in_the_place_of_a_models_folder_gives_way(agent: Agent, refs: list[Ref]) -> None:
    """A filesystem check after a power cut may leave it. It holds up neither the model nor the clean-up."""
    agent.deploy(refs[0])
    folder = agent.layout.models / "tiny"
    shutil.rmtree(folder)
    folder.write_text("lost")
    agent.restart()
    agent.deploy(refs[1])
    assert agent.view().version == "2.0.0"
    assert agent.on_disk()[0] == refs[1]
    agent.run_until(lambda: files.names(agent.layout.store) == [refs[1].digest], "the clean-up")
    (aside,) = agent.layout.state.glob("tiny.damaged-*")
    assert aside.read_text() == "lost"
    assert any(aside.name in event.detail for event in agent.events)


def test_rollback_goes_back_once(agent: Agent, refs: list[Ref], double: InferenceDouble) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    agent.deploy(v2)
    assert agent.updater.rollback("tiny", agent.now_ms()) == v1
    agent.run_until(lambda: agent.view().outcome == "reverted", "the rollback")
    assert (agent.view().version, agent.view().reason) == ("1.0.0", Reason.OPERATOR_ROLLBACK)
    assert (agent.on_disk(), double.loaded) == ((v1, None), {"tiny": v1.digest})
    with pytest.raises(MessageRejected) as fault:
        agent.updater.rollback("tiny", agent.now_ms())
    assert fault.value.reason is Reason.NO_PREVIOUS
    for _ in range(10):
        agent.updater.tick(agent.now_ms())
    assert agent.on_disk() == (v1, None)  # the generation was tried, and is not tried again


@pytest.mark.parametrize("state", ["idle", "probation"])
def test_two_rollbacks_at_once_are_one(agent: Agent, refs: list[Ref], state: str) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    if state == "probation":
        probation(agent, v2)
    else:
        agent.deploy(v2)
    agent.updater.rollback("tiny", agent.now_ms())
    with pytest.raises(MessageRejected) as fault:
        agent.updater.rollback("tiny", agent.now_ms())
    assert fault.value.reason is Reason.NO_PREVIOUS
    agent.run_until(lambda: agent.view().outcome == "reverted", "the rollback")
    assert agent.on_disk()[0] == v1


def test_rollback_without_anything_to_go_back_to(agent: Agent, refs: list[Ref]) -> None:
    with pytest.raises(MessageRejected) as fault:
        agent.updater.rollback("tiny", agent.now_ms())
    assert fault.value.reason is Reason.UNKNOWN_MODEL
    agent.deploy(refs[0])
    with pytest.raises(MessageRejected) as fault:
        agent.updater.rollback("tiny", agent.now_ms())
    assert fault.value.reason is Reason.NO_PREVIOUS


# disks


def test_a_journal_that_cannot_be_written_holds_the_step_and_loses_none(
    agent: Agent, refs: list[Ref], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.deploy(refs[0])
    real, broken = journal.save, [True]

    def save(layout: Layout, entry: Entry) -> None:
        if broken[0] and entry.state is State.DOWNLOADING:
            raise StorageFault(Reason.DISK_FULL, "no space", "free some")
        real(layout, entry)

    monkeypatch.setattr(journal, "save", save)
    monkeypatch.setattr("edge_agent.update.driver._STORAGE_PAUSE_S", 0.005)
    agent.want(tiny=refs[1])
    agent.run_until(lambda: any(e.kind == "storage" for e in agent.events), "the report")
    assert agent.view().state == "resolving"
    assert journal.load(agent.layout, "tiny", 0)[0].state is State.RESOLVING
    broken[0] = False
    assert agent.run_until_settled().outcome == "committed"
    assert agent.script.started.count(("fetch", refs[1].digest)) == 1


@pytest.mark.parametrize("end", ["committed", "failed", "reverted"])
def test_a_clean_up_that_fails_does_not_take_the_step_twice(
    agent: Agent, refs: list[Ref], double: InferenceDouble, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The journal has the end already; taking the step again would be a transition that does not exist."""
    v1, v2 = refs[:2]
    agent.deploy(v1)
    if end == "failed":
        agent.script.preflight[v2.digest] = [[Step(Event.REJECTED, Reason.LOAD_FAILED, "")]]
    if end == "reverted":
        double.refuse[v2.digest] = (422, Reason.LOAD_FAILED)

    def collect(self: Store, keep: set[str]) -> list[str]:
        raise StorageFault(Reason.STORAGE_FAULT, "input/output error", "look at the disk")

    monkeypatch.setattr(Store, "collect", collect)
    monkeypatch.setattr("edge_agent.update.driver._STORAGE_PAUSE_S", 0.005)
    assert agent.deploy(v2).outcome == end
    for _ in range(10):
        agent.updater.tick(agent.now_ms())
        time.sleep(0.002)
    assert agent.view().outcome == end
    assert [e.detail for e in agent.events if e.kind == "storage"] != []


def test_a_bad_version_leaves_service_also_when_the_disk_cannot_be_written(
    agent: Agent, refs: list[Ref], double: InferenceDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    v1, v2 = refs[:2]
    agent.deploy(v1)
    probation(agent, v2)
    real, broken = files.swap_link, [True]

    def swap(link: Path, target: str) -> None:
        if broken[0]:
            raise StorageFault(Reason.DISK_FULL, "no space", "free some")
        real(link, target)

    monkeypatch.setattr(files, "swap_link", swap)
    double.count(v2.digest, 100, errors=100)
    agent.run_until(lambda: double.loaded == {"tiny": v1.digest}, "the version before in service")
    assert (agent.view().state, agent.on_disk()[0]) == ("reverting", v2)
    broken[0] = False
    assert agent.run_until_settled().outcome == "reverted"
    assert agent.on_disk()[0] == v1
