"""One model's update machine at work: jobs in, transitions through the table, journal out.

Invariants: the journal is durable before the next state's job starts; every effect is idempotent, so a
kill anywhere means "do it again"; what serves is never touched before `activating`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import Update
from edge_agent.inference import InferenceClient, Loaded
from edge_agent.layout import Layout
from edge_agent.stats import VersionStats
from edge_agent.update import changes, gate, jobs, journal, trials, window
from edge_agent.update.changes import STORE_AT_FAULT, Situation, Step, change
from edge_agent.update.floor import Floor
from edge_agent.update.holdings import Holdings
from edge_agent.update.jobs import Job
from edge_agent.update.journal import NO_PERMISSIONS, Entry, Permissions, Ref
from edge_agent.update.levels import OrderFloor
from edge_agent.update.machine import CANCELLABLE, Action, Event, State, Transition, advance
from edge_agent.update.rejected import Rejected
from edge_agent.update.releases import min_release, raise_releases
from edge_agent.update.store import Store
from edge_contract import wire
from edge_contract.errors import (
    EdgewardError,
    MessageRejected,
    Reason,
    StorageFault,
    TransferFailed,
)

_STORAGE_PAUSE_S = 2.0
# Reasons that say nothing about the bundle: its digest may be tried again.
_NOT_THE_BUNDLE = frozenset(
    {
        Reason.SERVING_UNREACHABLE,
        Reason.DISK_FULL,
        Reason.STORAGE_FAULT,
        Reason.NOT_FOUND,
        Reason.BAD_INPUT,
        Reason.DEVICE_UNFIT,
        Reason.RUNTIME_MISSING,
        Reason.MEMORY_TOO_SMALL,
        # Somebody altered what the registry serves, or this disk: the bundle of that digest may be fine.
        Reason.DIGEST_MISMATCH,
        Reason.TRUST_FAILED,
        Reason.ROLLBACK_REFUSED,
    }
)


@dataclass(frozen=True, slots=True)
class Tools:
    """What every driver of one agent shares."""

    config_path: Path
    config: Update
    fetch_deadline_s: float
    layout: Layout
    store: Store
    inference: InferenceClient
    rejected: Rejected
    orders: Floor[OrderFloor]
    report: Callable[[wire.Event], None]
    collect: Callable[[int], None]


class ModelDriver:
    """Owned by the control loop's thread; `tick` never blocks for long."""

    def __init__(self, tools: Tools, name: str, now_ms: int) -> None:
        self._tools = tools
        self.name = name
        self._entry, problem = journal.load(tools.layout, name, now_ms)
        self._held = Holdings(tools.layout, tools.store, name)
        self._problem = "its links have not been read yet"
        self._wanted: Ref | None = None
        self._wanted_generation = 0
        self._permissions = NO_PERMISSIONS
        self._job: Job | None = None
        self._steps: list[Step] = []
        self._resume_s = 0.0
        self._unserved: tuple[Reason, str] | None = None
        if problem:
            self._say("storage", Reason.STORAGE_FAULT, problem, now_ms)
        try:
            self._arrive()
        except StorageFault as e:
            self._hold(e, now_ms)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way or about to be."""
        nothing = not self._steps and not self._problem and self._next_wish() is None
        return self._entry.state is State.IDLE and nothing

    @property
    def gone(self) -> bool:
        """Whether the model was removed and can be forgotten."""
        serves = self._held.current or changes.should_serve(self._entry)
        return self.idle and serves is None and self._wanted is None

    @property
    def generation(self) -> int:
        """The newest generation that its journal knows."""
        return max(self._entry.generation, self._entry.settled_generation)

    @property
    def in_use(self) -> set[str]:
        """Digests that the attempt under way needs in the store."""
        entry = self._entry
        if entry.state is State.IDLE:
            return set()
        return {ref.digest for ref in (entry.target, entry.base, entry.older) if ref is not None}

    def want(self, target: Ref | None, generation: int, permissions: Permissions = NO_PERMISSIONS) -> None:
        """What the desired state of `generation` says of this model; None means it is not in the set."""
        self._wanted, self._wanted_generation, self._permissions = target, generation, permissions

    def fell_back(self, digest: str, reason: Reason, now_ms: int) -> None:
        """The inference process serves the version before by itself: follow it, or repair what it left.

        Raises StorageFault and changes nothing.
        """
        if reason in STORE_AT_FAULT and self._entry.state is State.IDLE and self._held.repairable:
            what = "the inference process could not load it from this disk"
            self._held.inspect(self._entry, self._wanted, what)
        elif self._held.previous is not None and self._held.previous.digest == digest:
            ready = self._entry.state in (State.IDLE, State.PROBATION) and not self._steps
            if ready:
                with suppress(MessageRejected):
                    self.rollback(reason, "it did not start here; the version before serves", now_ms)

    @property
    def unserved(self) -> bool:
        """Whether the disk names a version that the inference process had not loaded when last looked at."""
        return self._unserved is not None

    def noticed(self, loaded: Loaded | None, now_ms: int) -> None:
        """What the inference process says of this model, None when it does not know it."""
        current = self._held.current
        settled = self._entry.state is State.IDLE and not self._steps and not self._problem
        before, self._unserved = self._unserved, None
        if settled and current is not None and (loaded is None or not loaded.ready):
            why = f": {loaded.detail}" if loaded and loaded.detail else ""
            reason = loaded.reason if loaded and loaded.reason is not Reason.OK else Reason.MODEL_NOT_READY
            self._unserved = (reason, f"{current.version} is not loaded, and is tried again{why}")
        if self._unserved is not None and before is None:
            self._say("serving", *self._unserved, now_ms)

    def rollback(self, reason: Reason, detail: str, now_ms: int) -> Ref:
        """Go back to the version before; returns it once the journal says so.

        Raises MessageRejected when there is none, StorageFault when the journal cannot be written.
        """
        self._drain_steps(now_ms)
        base = self._entry.base if self._entry.state is State.PROBATION else self._held.previous
        possible = self._entry.state is State.PROBATION or (
            self._entry.state is State.IDLE and self._held.current is not None
        )
        if base is None or not possible or self._problem:
            raise MessageRejected(
                Reason.NO_PREVIOUS,
                f"{self.name} has no version to go back to now (state {self._entry.state.value})",
                "wait for the reported state, or deploy the wanted version instead",
            )
        self._steps.append(Step(Event.ROLLBACK, reason, detail))
        try:
            self._drain_steps(now_ms)
        except StorageFault:
            self._steps.clear()
            raise
        return base

    def found_damaged(self, digest: str, what: str, begun_s: float, now_ms: int) -> None:
        """A look at the disk that began then found a stored version damaged. Raises StorageFault."""
        told = self._held.found_damaged(self._entry, digest, what, begun_s)
        if told:
            self._say("storage", Reason.DIGEST_MISMATCH, told, now_ms)

    def hurry(self) -> None:
        """What it waits for may have come by another way: try again now."""
        if self._entry.state is State.WAITING:
            self._job = jobs.WaitJob(0.0)

    def tick(self, now_ms: int) -> None:
        """Take what happened, and start what the state asks for."""
        if time.monotonic() < self._resume_s:
            return
        try:
            self._arrive()
            self._drain(now_ms)
            self._poll(now_ms)
        except StorageFault as e:
            # A step that is not in the journal stays queued and is taken again; one that is, is done.
            self._hold(e, now_ms)

    def stop(self) -> None:
        """End the job; the journal knows where to go on, and that this was no accident."""
        if self._job is not None:
            self._job.cancel()
        after = changes.uncounted(self._entry)
        if after != self._entry:
            with suppress(StorageFault):
                journal.save(self._tools.layout, after)

    def view(self) -> wire.ModelState:
        """What is reported of this model."""
        entry = self._entry
        waits = self._waits_for_window()
        reason, detail = (Reason.OUTSIDE_WINDOW, waits) if waits else (entry.reason, entry.detail)
        if self._unserved is not None and entry.state is State.IDLE:
            reason, detail = self._unserved
        return wire.ModelState(
            name=self.name,
            state=entry.state.value,
            version=self._held.current.version if self._held.current else None,
            digest=self._held.current.digest if self._held.current else None,
            previous_version=self._held.previous.version if self._held.previous else None,
            previous_digest=self._held.previous.digest if self._held.previous else None,
            target_version=entry.target.version if entry.target else None,
            target_digest=entry.target.digest if entry.target else None,
            outcome=entry.outcome,
            reason=Reason.STORAGE_FAULT if self._problem else reason,
            detail=self._problem or detail,
            progress=round(self._job.progress, 3) if self._job else 0.0,
            since_ms=entry.since_ms,
        )

    def _waits_for_window(self) -> str:
        """Why a fetched version is not tried yet, or nothing.

        What serves changes in the window only; a first version and a repair of what serves wait for none.
        """
        entry, text = self._entry, self._tools.config.window
        current = self._held.current
        changes_service = current is not None and current != entry.target
        if not text or entry.state is not State.PREFLIGHT or self._job is not None or not changes_service:
            return ""
        wait_s, clock = gate.opens_in_s(window.parse(text))
        return f"it is {clock}, {self.name} changes in {text} only ([update] window)" if wait_s else ""

    def _arrive(self) -> None:
        """At the start, and again after the disk did not answer: what do links and journal say?"""
        if not self._problem:
            return
        self._held.learn()
        entry = self._entry
        torn = entry.state is State.PROBATION and self._held.current != entry.target
        event = Event.TORN if torn else Event.RESTARTED
        self._held.inspect(entry, self._wanted)
        self._steps.insert(0, Step(event, entry.reason, entry.detail))
        self._problem = ""

    def _hold(self, fault: StorageFault, now_ms: int) -> None:
        self._resume_s = time.monotonic() + min(_STORAGE_PAUSE_S, self._tools.config.retry_s)
        if self._problem:
            self._problem = str(fault)
        self._say("storage", fault.reason, str(fault), now_ms)

    def _drain_steps(self, now_ms: int) -> None:
        while self._steps:
            before = self._entry.state
            transition = self._take(self._steps[0], now_ms)
            self._steps.pop(0)  # it is in the journal: a fault from here on must not take it twice
            self._follow(before, transition, now_ms)

    def _drain(self, now_ms: int) -> None:
        self._drain_steps(now_ms)
        wish = self._next_wish()
        if wish is not None:
            before = self._entry.state
            self._follow(before, self._take(wish, now_ms), now_ms)

    def _poll(self, now_ms: int) -> None:
        if self._job is None:
            self._job = self._start_job(now_ms)
        if self._job is not None:
            self._steps.extend(self._job.poll(now_ms))
            self._drain(now_ms)

    def _next_wish(self) -> Step | None:
        """What the desired state asks of the machine now."""
        entry, wanted = self._entry, self._wanted
        if entry.state in CANCELLABLE:
            other = wanted is None or entry.target is None or wanted.digest != entry.target.digest
            return Step(Event.SUPERSEDED) if other and self._wanted_generation > entry.generation else None
        if entry.state is not State.IDLE:
            return None
        if entry.settled_generation >= self._wanted_generation:
            return self._held.damage
        if wanted is None:
            return Step(Event.UNWANTED)
        if self._held.current is not None and self._held.current.digest == wanted.digest:
            return Step(Event.ALREADY)
        return Step(Event.TARGET)

    def _start_job(self, now_ms: int) -> Job | None:
        entry, tools = self._entry, self._tools
        if entry.state is State.REVERTING:  # also when nobody knows any more what it goes back from
            return jobs.revert(entry, tools.store, tools.inference)
        target = entry.target
        if target is None:
            return None
        pause_max_s = tools.config.retry_max_s
        if self._waits_for_window():
            return None
        starts: dict[State, Callable[[], Job]] = {
            State.RESOLVING: lambda: jobs.FetchJob(
                tools.config_path,
                self.name,
                target,
                tools.rejected,
                min_release(tools.orders, entry),
                tools.fetch_deadline_s,
            ),
            State.PREFLIGHT: lambda: trials.PreflightJob(entry, tools.layout, tools.store, tools.config),
            State.ACTIVATING: lambda: jobs.activate(entry, tools.store, tools.inference),
            State.PROBATION: lambda: trials.ProbationJob(entry, tools.store, tools.config, tools.inference),
            State.WAITING: lambda: jobs.WaitJob(changes.pause_left_s(entry, now_ms, pause_max_s)),
        }
        start = starts.get(entry.state)
        return start() if start else None

    def _take(self, step: Step, now_ms: int) -> Transition:
        """One transition: effects that must precede the journal, and the journal."""
        before = self._entry
        step = changes.bounded(before, step, self._tools.config.max_attempts)
        transition = advance(before.state, step.event)
        entry = change(before, step, transition, self._situation(step, now_ms))
        for action in transition.actions:
            if action is not Action.COLLECT:
                _EFFECTS[action](self, entry)
        if entry != before:
            journal.save(self._tools.layout, entry)
        self._entry = entry
        self._held.after(entry, transition)
        return transition

    def _follow(self, before: State, transition: Transition, now_ms: int) -> None:
        """What comes after the journal, and may be lost without harm."""
        entry = self._entry
        self._leave(before, transition.state)
        self._held.learn()
        if transition.state is not before or transition.outcome == "removed":
            what = transition.outcome or transition.state.value
            self._say("update", entry.reason, f"{what}: {entry.detail}".rstrip(": "), now_ms)
        if Action.COLLECT in transition.actions:
            self._tools.collect(now_ms)

    def _situation(self, step: Step, now_ms: int) -> Situation:
        return Situation(
            now_ms=now_ms,
            wanted=self._wanted,
            wanted_generation=self._wanted_generation,
            current=self._held.current,
            previous=self._held.previous,
            baseline=self._baseline() if step.event is Event.PASSED else None,
            retry_s=self._tools.config.retry_s,
            retry_max_s=self._tools.config.retry_max_s,
            draw=random.random(),  # noqa: S311 - jitter
            damaged=self._held.damaged,
            permissions=self._permissions,
        )

    def _baseline(self) -> VersionStats | None:
        """What the serving version has counted so far; probation compares with it."""
        try:
            return trials.version_stats(self._tools.inference.stats(), self.name, self._entry.base)
        except TransferFailed:
            return None  # it is restarting: probation judges the new version on its own

    def _leave(self, before: State, after: State) -> None:
        """Drop the job of the state that is left; the fetch child's job spans two states."""
        spans = after is State.DOWNLOADING and isinstance(self._job, jobs.FetchJob)
        if after is not before and not spans:
            self._job = None

    def _cancel(self, entry: Entry) -> None:  # noqa: ARG002 - the shape of an effect
        if self._job is not None:
            self._job.cancel()

    def _remember(self, entry: Entry) -> None:
        # A version that had been committed may have been struck out by power cuts alone.
        power = entry.reason is Reason.FAILED_STARTS and self._entry.outcome == "committed"
        if entry.target is not None and entry.reason not in _NOT_THE_BUNDLE and not power:
            self._tools.rejected.add(entry.target.digest, entry.reason, entry.detail, entry.since_ms)

    def _raise_release(self, entry: Entry) -> None:
        if entry.target is not None:
            raise_releases(self._tools.orders, self._tools.store, {entry.name: [entry.target]})

    def _remove(self, entry: Entry) -> None:
        self._tools.store.point(entry.name, None, None)
        with suppress(EdgewardError):
            # Down, or it never had the model: with no link on the disk it will not load it again.
            self._tools.inference.unload(entry.name, 5.0)

    def _say(self, kind: str, reason: Reason, detail: str, now_ms: int) -> None:
        target = self._entry.target
        version = target.version if target else ""
        self._tools.report(wire.Event(now_ms, kind, self.name, version, reason, detail))


_EFFECTS: dict[Action, Callable[[ModelDriver, Entry], None]] = {
    Action.CANCEL: ModelDriver._cancel,
    Action.REMEMBER_REJECTED: ModelDriver._remember,
    Action.REMOVE: ModelDriver._remove,
    Action.RAISE_RELEASE: ModelDriver._raise_release,
}
