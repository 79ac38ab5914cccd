"""The two jobs that try a candidate: preflight, before it serves, and probation, while it does.

Polled like the jobs of jobs.py. What they find is said by the child or by probation.py; they add how a child
ended, which is a finding, too.
"""

from __future__ import annotations

import math
import signal
from collections import deque

import psutil
from msgspec import UNSET, UnsetType

from edge_agent import files
from edge_agent.config import Update
from edge_agent.inference import InferenceClient
from edge_agent.layout import Layout
from edge_agent.stats import ServingStats, VersionStats, since
from edge_agent.update import probation
from edge_agent.update.changes import STORE_AT_FAULT, Step
from edge_agent.update.children import Child, Ended
from edge_agent.update.journal import Entry, Ref
from edge_agent.update.leash import UNCONFINED, Limits
from edge_agent.update.machine import Event
from edge_agent.update.store import Store
from edge_contract.errors import DeviceUnfit, EdgewardError, Reason, StorageFault, TransferFailed
from edge_contract.manifest import Probation, interface_change

_OPEN_FILES = 256
# Somebody else may kill a child (a watchdog, a person, the kernel for another's sake): not at once its fault.
_MOST_STARTS = 3
_LOOK_EVERY_MS = 500
_LONGEST_STEP_MS = 5000
_MOST_LOOKS = 7200  # an hour


class PreflightJob:
    """The candidate's first load, in a child under limits, and then the making of this device's own form.

    Clients of the version before must be able to talk to it, unless the operator allowed another interface.
    """

    def __init__(self, entry: Entry, layout: Layout, store: Store, config: Update) -> None:
        if entry.target is None:
            raise RuntimeError("a preflight without a target")
        self.progress = 0.0
        self._layout, self._config = layout, config
        self._digest = entry.target.digest
        self._starts = 0
        self._passed = False
        self._unconfined = ""
        self._limits = Limits()
        self._child: Child | None = None
        self._refusal = _interface_refusal(entry, entry.target, store) or _room_refusal(entry.target, store)
        if self._refusal is None:
            self._start()

    def poll(self, now_ms: int) -> list[Step]:  # noqa: ARG002 - a child has its own deadline
        if self._child is None:
            return [self._refusal] if self._refusal else []
        ended = self._child.ended()  # before the lines, so that none of them is missed
        for line in self._child.lines():
            self._passed |= line.get("ok") is True
            if line.get("event") == UNCONFINED:
                self._unconfined = f"it was tried with the network of the agent: {line.get('why')}"
        if ended is None:
            return []
        self._child = None
        if self._passed:  # what came after the verdict was the prepared form, which may fail
            return [Step(Event.PASSED, detail=self._unconfined)]
        if ended.code == -signal.SIGKILL and not ended.hung and self._starts < _MOST_STARTS:
            return self._start_again()
        return [self._finding(ended)]

    def cancel(self) -> None:
        if self._child is not None:
            self._child.kill()

    def _start(self) -> None:
        self._starts += 1
        self._limits = preflight_limits(self._layout, self._config)
        self._child = preflight_child(self._layout, self._digest, self._config, self._limits)

    def _start_again(self) -> list[Step]:
        """Without a process now, the whole attempt waits: nobody would poll for one that never began."""
        try:
            self._start()
        except StorageFault as e:
            return [Step(Event.INTERRUPTED, e.reason, f"preflight: its child cannot be started again: {e}")]
        return []

    def _finding(self, ended: Ended) -> Step:
        reason, detail = ended.failure()
        if ended.code == StorageFault.exit_code or reason in STORE_AT_FAULT:
            return Step(Event.INTERRUPTED, reason, f"preflight: {detail}")  # this disk, not the bundle
        if ended.code == DeviceUnfit.exit_code:
            return Step(Event.UNFIT, reason, detail)
        if ended.code == -signal.SIGXCPU:
            reason = Reason.CANDIDATE_HUNG
            detail = f"the child used more than {self._limits.cpu_s} s of CPU time and was killed"
        if ended.code == -signal.SIGKILL and not ended.hung:
            detail = f"the child was killed {self._starts} times, as the kernel does when memory runs out"
        if (
            reason is Reason.MEMORY_EXCEEDED
            and self._limits.memory_bytes < self._config.preflight_memory_bytes
        ):
            # On an emptier device it may do: no verdict on the bundle.
            return Step(Event.UNFIT, Reason.MEMORY_TOO_SMALL, f"preflight: {detail}")
        return Step(Event.REJECTED, reason, f"preflight: {detail}")


def preflight_limits(layout: Layout, config: Update) -> Limits:
    """What a candidate's child may take now. Raises StorageFault."""
    room_bytes = max(0, files.free_bytes(layout.store) - config.disk_reserve_bytes)
    return Limits(
        # More than there is would end in the kernel's choice of whom to kill, and that may be the server.
        memory_bytes=min(config.preflight_memory_bytes, psutil.virtual_memory().available),
        cpu_s=math.ceil(config.preflight_timeout_s),
        open_files=_OPEN_FILES,
        file_bytes=max(1, min(room_bytes, config.prepared_max_bytes)),
        confined=True,
        expendable=True,
    )


def preflight_child(layout: Layout, digest: str, config: Update, limits: Limits) -> Child:
    """`edge-agent preflight` of a stored version, which then makes its prepared form. Raises StorageFault."""
    arguments = ["preflight", str(layout.version(digest)), "--json"]
    arguments += ["--latency-factor", str(config.preflight_latency_factor)]
    arguments += ["--memory-factor", str(config.preflight_memory_factor)]
    arguments += ["--free-bytes", str(config.preflight_free_bytes)]
    if config.prepared_max_bytes:
        arguments += ["--prepare", str(layout.prepared), "--prepare-bytes", str(limits.file_bytes)]
    return Child(arguments, timeout_s=config.preflight_timeout_s, limits=limits)


def _room_refusal(target: Ref, store: Store) -> Step | None:
    """A child without memory would crash, and that would be held against the bundle."""
    try:
        wanted = store.manifest_of(target.digest).expected.peak_rss_bytes
    except EdgewardError:
        return None  # preflight names the damage
    found = psutil.virtual_memory().available
    if found >= wanted:
        return None
    detail = (
        f"{target.version} takes {wanted} bytes of memory, {found} are free → free memory, then deploy again"
    )
    return Step(Event.UNFIT, Reason.MEMORY_TOO_SMALL, detail)


def _interface_refusal(entry: Entry, target: Ref, store: Store) -> Step | None:
    if entry.base is None or entry.permissions.interface_change:
        return None
    try:
        change = interface_change(store.manifest_of(entry.base.digest), store.manifest_of(target.digest))
    except EdgewardError:
        return None  # which of the two is damaged, preflight and the loader say
    if not change:
        return None
    return Step(
        Event.UNFIT,
        Reason.INTERFACE_CHANGED,
        f"clients of {entry.base.version} cannot use {target.version}: {change} → change the "
        "clients, then deploy with --allow-interface-change",
    )


class ProbationJob:
    """Watches the new version's counts; they survive a restart of the inference process as sums."""

    def __init__(self, entry: Entry, store: Store, config: Update, inference: InferenceClient) -> None:
        self.progress = 0.0
        self._entry = entry
        self._config = probation.thresholds(config, _own_thresholds(entry, store))
        self._inference = inference
        self._lifeline = inference.lifeline()
        self._pid = 0
        self._restarts = 0
        self._earlier: list[VersionStats] = []
        self._latest: VersionStats | None = None
        self._memory: deque[int] = deque(maxlen=_MOST_LOOKS)
        self._last_look_ms = 0
        self._elapsed_s = 0.0

    def poll(self, now_ms: int) -> list[Step]:
        step_ms = now_ms - self._last_look_ms
        if 0 <= step_ms < _LOOK_EVERY_MS:
            return []
        if self._last_look_ms:
            # A clock that is set (no RTC, the network comes) must not end a probation unseen, so only
            # time that was watched counts. After a restart of this process it begins anew.
            self._elapsed_s += min(max(step_ms, 0), _LONGEST_STEP_MS) / 1000
        self._last_look_ms = now_ms
        answering = self._look()
        verdict = probation.judge(
            self._config,
            self._counts() if answering else None,
            self._entry.baseline,
            probation.Process(self._restarts, list(self._memory)),
            self._elapsed_s,
        )
        if isinstance(verdict, probation.Watch):
            self.progress = verdict.share
            return []
        self.cancel()
        if isinstance(verdict, probation.Unhealthy):
            return [Step(Event.UNHEALTHY, verdict.reason, verdict.detail)]
        return [Step(Event.HEALTHY, Reason.OK, verdict.detail)]

    def cancel(self) -> None:
        """Nothing runs between polls."""
        self._lifeline.close()

    def _look(self) -> bool:
        if self._lifeline.broke():
            self._restarts += 1
            return False  # asking a process that is just starting would only hold up the next look
        try:
            stats = self._inference.stats()
        except TransferFailed:
            return False
        if self._pid and stats.pid != self._pid:
            self._memory.clear()
            if self._latest is not None:
                self._earlier.append(self._latest)
        self._pid = stats.pid
        self._memory.append(stats.private_bytes)
        self._latest = version_stats(stats, self._entry.name, self._entry.target)
        return self._latest is not None

    def _counts(self) -> VersionStats | None:
        if self._latest is None:
            return None
        total = self._latest
        for part in self._earlier:
            total = _sum(total, part)
        return total


def _own_thresholds(entry: Entry, store: Store) -> Probation | UnsetType:
    """What the manifest says on probation; nothing when it cannot be read, which is the loader's to say."""
    try:
        return store.manifest_of(entry.target.digest).probation if entry.target else UNSET
    except EdgewardError:
        return UNSET


def version_stats(stats: ServingStats, name: str, ref: Ref | None) -> VersionStats | None:
    """The counts of one version, if it is loaded."""
    if ref is None:
        return None
    return next((v for v in stats.versions if (v.name, v.digest) == (name, ref.digest)), None)


def _sum(a: VersionStats, b: VersionStats) -> VersionStats:
    """Counts are additive: a + b is a - (0 - b)."""
    negative = VersionStats(
        name=a.name,
        version=a.version,
        digest=a.digest,
        loaded_ms=a.loaded_ms,
        requests=-b.requests,
        errors=-b.errors,
        non_finite=-b.non_finite,
        latency_counts=[-n for n in b.latency_counts],
        top1_counts={k: [-n for n in v] for k, v in b.top1_counts.items()},
    )
    return since(a, negative)
