"""The long work of the states but two (trials.py): polled, never blocking the control loop.

A job turns what happened into events of the machine; it decides nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from edge_agent.inference import InferenceClient, Lifeline
from edge_agent.update.changes import STORE_AT_FAULT, Step
from edge_agent.update.children import Child, Ended, no_thread
from edge_agent.update.journal import Entry, Ref
from edge_agent.update.machine import Event
from edge_agent.update.rejected import Rejected
from edge_agent.update.store import Store
from edge_contract.errors import (
    BundleRejected,
    DeviceUnfit,
    EdgewardError,
    Reason,
    StorageFault,
    TransferFailed,
)

# Metadata, documents and blobs have `deadline_s` each; decoding and hashing have this.
_FETCH_PHASES, _FETCH_SLACK_S = 3, 3600.0
_LOAD_TIMEOUT_S = 120.0
_PATIENCE_S = 60.0
_PAUSE_S = 0.3
_MOST_ENDS = 1


class Job(Protocol):
    """Work of one or more states."""

    progress: float

    def poll(self, now_ms: int) -> list[Step]:
        """What happened since the last poll."""

    def cancel(self) -> None:
        """Stop it; called once, when its result is no longer wanted."""


class FetchJob:
    """Resolving and downloading, in the fetch child."""

    def __init__(
        self,
        config_path: Path,
        name: str,
        target: Ref,
        rejected: Rejected,
        min_release: int,
        deadline_s: float,
    ) -> None:
        """`deadline_s` is the child's own bound; one that outlives it by far is killed."""
        self.progress = 0.0
        self._missing_bytes = 0
        self._refusal = _rejected_before(target, rejected)
        self._child: Child | None = None
        if self._refusal is None:
            arguments = ["fetch", "--config", str(config_path), name, target.version, target.digest]
            arguments += ["--min-release", str(min_release)]
            self._child = Child(arguments, timeout_s=_FETCH_PHASES * deadline_s + _FETCH_SLACK_S)

    def poll(self, now_ms: int) -> list[Step]:  # noqa: ARG002 - a child has its own deadline
        if self._child is None:
            return [self._refusal] if self._refusal else []
        ended = self._child.ended()  # before the lines, so that none of them is missed
        steps = []
        for line in self._child.lines():
            if line.get("event") == "resolved":
                self._missing_bytes = int(line["missing_bytes"])
                steps.append(Step(Event.RESOLVED))
            elif line.get("event") == "replanned":
                self._missing_bytes = int(line["missing_bytes"])
            elif line.get("event") == "progress" and self._missing_bytes:
                self.progress = min(1.0, int(line["done_bytes"]) / self._missing_bytes)
        if ended is not None:
            self._child = None
            steps.append(_fetch_outcome(ended)._replace(progressed=self.progress > 0))
        return steps

    def cancel(self) -> None:
        if self._child is not None:
            self._child.kill()


def _rejected_before(target: Ref, rejected: Rejected) -> Step | None:
    known = rejected.get(target.digest)
    if known is None:
        return None
    return Step(
        Event.UNFIT,
        Reason.DIGEST_REJECTED_BEFORE,
        f"this device has thrown out {target.version} before: {known.detail} [{known.reason.value}] → "
        "deploy another version, or `edge-fleet command clear-rejected` first",
    )


def _fetch_outcome(ended: Ended) -> Step:
    if ended.code == 0 and ended.last.get("event") == "done":
        return Step(Event.FETCHED, detail=str(ended.last.get("detail", "")))
    reason, detail = ended.failure()
    by_code = {
        BundleRejected.exit_code: Event.REJECTED,
        DeviceUnfit.exit_code: Event.UNFIT,
        TransferFailed.exit_code: Event.INTERRUPTED,
        StorageFault.exit_code: Event.INTERRUPTED,
    }
    event = by_code.get(ended.code, Event.INTERRUPTED)
    return Step(event, reason, detail, pause_s=float(ended.last.get("retry_after_s") or 0.0))


class ThreadJob:
    """A bounded piece of blocking work on a thread of its own; its result is one step."""

    def __init__(self, work: Callable[[], Step]) -> None:
        """Raises StorageFault when no thread can be made now."""
        self.progress = 0.0
        self._result: list[Step] = []
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as e:  # Python's word for "too many tasks"
            raise no_thread(e) from e

    def _run(self) -> None:
        self._result = [self._work()]

    def poll(self, now_ms: int) -> list[Step]:  # noqa: ARG002 - its work bounds itself
        if self._thread.is_alive():
            return []
        if not self._result:
            raise RuntimeError("a job's thread died without a result")
        return self._result

    def cancel(self) -> None:
        """Nothing to do: its effects are idempotent, and no state with such a job is cancellable."""


def activate(entry: Entry, store: Store, inference: InferenceClient) -> ThreadJob:
    """Load beside the old version, flip, then make the disk say so."""
    target = entry.target
    if target is None:
        raise RuntimeError("activation without a target")
    # Of a version that is repaired, the version before is the one that is kept already.
    previous = entry.older if entry.base == target else entry.base

    def work() -> Step:
        try:
            load = partial(inference.load, entry.name, target.digest, _LOAD_TIMEOUT_S)
            with closing(inference.lifeline()) as lifeline:
                _patiently(_survived(load, lifeline))
            store.point(entry.name, target, previous)
            # Nothing to do, unless the process fell over in between and has read the old link. If it is
            # down at this moment, it will read the new one.
            with suppress(TransferFailed):
                load()
        except EdgewardError as e:
            disk = isinstance(e, StorageFault) or e.reason in STORE_AT_FAULT
            later = disk and _undone(entry, store, inference)
            return Step(Event.INTERRUPTED if later else Event.UNHEALTHY, e.reason, f"activation: {e.what}")
        return Step(Event.ACTIVATED)

    return ThreadJob(work)


def _survived(load: Callable[[], None], lifeline: Lifeline) -> Callable[[], None]:
    """`load`, given up when the inference process ends again and again while it is at it.

    One end may be somebody else's doing. Each costs requests, so patience must not go on.
    """
    ends = 0

    def attempt() -> None:
        nonlocal ends
        try:
            load()
        except TransferFailed as e:
            ends += lifeline.broke()
            if ends <= _MOST_ENDS:
                raise
            raise BundleRejected(
                Reason.CANDIDATE_CRASHED,
                f"the inference process ended {ends} times while it loaded this version",
                "do not deploy this version; see the log of edge-inference.service",
            ) from e

    return attempt


def _undone(entry: Entry, store: Store, inference: InferenceClient) -> bool:
    """Whether all is again as it was before the activation, so that it can be tried another time.

    The disk that was in the way of the activation may be in the way of this, too: it is given time.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            store.point(entry.name, entry.base, entry.older)
            if entry.base is None:
                inference.unload(entry.name, _LOAD_TIMEOUT_S)
            else:
                inference.load(entry.name, entry.base.digest, _LOAD_TIMEOUT_S)
        except StorageFault:
            time.sleep(_PAUSE_S)
        except EdgewardError:
            return False
        else:
            return True
    return False


def revert(entry: Entry, store: Store, inference: InferenceClient) -> ThreadJob:
    """Make the version before serve, by the disk and by the inference process, which may be down."""

    def on_disk() -> bool:
        try:
            store.point(entry.name, entry.base, entry.older)
        except StorageFault:
            return False
        return True

    def work() -> Step:
        note = ""
        # The disk first, for the inference process may fall over; but a full disk must not keep a bad
        # version in service. The revert is over when the disk says so; until then the state tells.
        written = on_disk()
        try:
            if entry.base is None:
                _patiently(lambda: inference.unload(entry.name, _LOAD_TIMEOUT_S), patience_s=10.0)
            else:
                base = entry.base
                _patiently(lambda: inference.load(entry.name, base.digest, _LOAD_TIMEOUT_S), patience_s=10.0)
        except EdgewardError as e:
            note = f"; the disk names the version before, but {e.what}"
        while not written:
            time.sleep(_PAUSE_S)
            written = on_disk()
        return Step(Event.REVERTED, entry.reason, entry.detail + note)

    return ThreadJob(work)


def _patiently(call: Callable[[], None], patience_s: float = _PATIENCE_S) -> None:
    """Retry while nobody answers: the inference process may be restarting."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            return call()
        except TransferFailed:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_PAUSE_S)


class WaitJob:
    """The pause before an interrupted attempt is taken up again. A clock that is set does not change it."""

    def __init__(self, pause_s: float) -> None:
        self.progress = 0.0
        self._until_s = time.monotonic() + pause_s

    def poll(self, now_ms: int) -> list[Step]:  # noqa: ARG002 - the wall clock may jump by decades
        return [Step(Event.RETRY)] if time.monotonic() >= self._until_s else []

    def cancel(self) -> None:
        """Nothing runs."""
