"""The set of models this process serves: one pointer per model, flipped when a new version is ready.

It decides which version a request gets and when an old one is let go. It does not run requests
(admission.py) and does not choose versions: the disk's links and the control process do.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edge_agent import files
from edge_agent.config import Serving
from edge_agent.layout import Layout
from edge_agent.serving import deadman, heap
from edge_agent.serving.loader import Opened, open_version
from edge_agent.serving.metrics import VersionCounters
from edge_agent.serving.starts import Starts
from edge_agent.serving.version import Version
from edge_contract import canonical
from edge_contract.errors import DeviceUnfit, EdgewardError, Reason, RequestRejected, StorageFault
from edge_contract.manifest import Name

_log = logging.getLogger("edge_agent.serving")


class Note(NamedTuple):
    """Why a model does not serve what the disk names."""

    reason: Reason
    detail: str


@dataclass(slots=True)
class _Slot:
    """One model: what serves, what served before it, and why it may not be what the disk names."""

    serving: Version | None = None
    retired: VersionCounters | None = None
    draining: asyncio.Task[None] | None = None
    digest: str = ""
    note: Note | None = None


class ModelSet:
    """All models.

    Invariants: every method runs on the event loop. Between choosing a version and pinning it nothing
    is awaited, so a version is closed only after its last request. A model has at most one version
    draining: the next load waits for it. Loads happen one at a time, in a thread of their own.
    """

    def __init__(self, layout: Layout, config: Serving) -> None:
        self._layout = layout
        self._config = config
        self._slots: dict[str, _Slot] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._starts = Starts(layout.starts, layout.spare_starts)
        self._loader = concurrent.futures.ThreadPoolExecutor(1, "loader")
        self._loading = False
        self.started = False

    async def start(self) -> None:
        """Load what the disk names, model by model. What does not load is noted; the others serve."""
        for name in self._names():
            await self._start(name)
        self.started = True

    async def load(self, name: str, digest: str | None = None) -> Version:
        """Serve `digest` (default: what the disk names) as `name`; returns once new requests reach it.

        The version before serves until then, and stays if this raises: RequestRejected,
        BundleRejected, DeviceUnfit or StorageFault.
        """
        async with self._locks[name]:
            slot = self._slots.get(name) or _Slot()
            version = await self._load(name, slot, digest or self._named(name))
            self._slots[name] = slot
            return version

    async def unload(self, name: str) -> None:
        """Stop serving `name`; nothing happens when nothing of that name is known."""
        async with self._locks[name]:
            slot = self._slots.pop(name, None)
            if slot is None:
                return
            self._retire(slot)
            _log.info("unloaded %s", name)
            if slot.draining is not None:
                await slot.draining

    def pin(self, name: str, version: str | None) -> Version:
        """The version that answers a request, pinned until `release`. Raises RequestRejected."""
        found = self.find(name, version)
        found.pin()
        return found

    def find(self, name: str, version: str | None) -> Version:
        """The version that serves `name`; with `version`, only that one. Raises RequestRejected."""
        slot = self._slots.get(name)
        if slot is None:
            have = ", ".join(sorted(self._slots)) or "none"
            raise _unknown(f"no model {name!r} here; there is {have}", "name a model that is deployed")
        if slot.serving is None:
            why = f": {slot.note.detail}" if slot.note else ""
            raise RequestRejected(
                503,
                Reason.MODEL_NOT_READY,
                f"the model {name!r} is not loaded{why}",
                "deploy a version that loads on this device",
            )
        if version is not None and version != slot.serving.manifest.version:
            serving = slot.serving.manifest.version
            raise _unknown(
                f"the model {name!r} serves version {serving!r}, not {version!r}",
                "leave the version out, or name the one that serves",
            )
        return slot.serving

    def index(self) -> list[dict[str, str]]:
        """The repository index: one entry per model that serves or should."""
        return [_entry(name, slot) for name, slot in sorted(self._slots.items())]

    def counters(self) -> list[tuple[VersionCounters, bool]]:
        """Counts of what serves (True) and of the version each model served before (False)."""
        found: list[tuple[VersionCounters, bool]] = []
        for _, slot in sorted(self._slots.items()):
            found += [(slot.serving.counters, True)] if slot.serving else []
            found += [(slot.retired, False)] if slot.retired else []
        return found

    def ready(self) -> bool:
        """Whether every model serves."""
        return self.started and all(s.serving is not None for s in self._slots.values())

    @property
    def busy(self) -> bool:
        """Whether the loading thread is in a load, which cannot be interrupted."""
        return self._loading

    def close(self) -> None:
        """The process ends: load nothing more, and leave what is draining to the end of the process."""
        for slot in self._slots.values():
            if slot.draining is not None:
                slot.draining.cancel()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _names(self) -> list[str]:
        folder = self._layout.models
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(n for n in names if _is_name(n) and _target(self._layout.current(n)))

    def _named(self, name: str) -> str:
        digest = files.link_target(self._layout.current(name))
        if digest is None:
            raise RequestRejected(
                404,
                Reason.NOT_FOUND,
                f"the disk names no version of {name!r}",
                "deploy one, or give a digest",
            )
        return digest

    async def _start(self, name: str) -> None:
        links = (self._layout.current(name), self._layout.previous(name))
        digests = list(dict.fromkeys(d for d in map(_target, links) if d))
        slot = self._slots[name] = _Slot(digest=digests[0])
        for digest in digests:
            outcome = await self._try_start(name, digest)
            if isinstance(outcome, Opened):
                self._flip(slot, outcome)
                return
            slot.note = slot.note or outcome
            _log.error("%s %s does not start: %s [%s]", name, digest[:12], outcome.detail, outcome.reason)

    async def _try_start(self, name: str, digest: str) -> Opened | Note:
        failed = self._starts.failed(name, digest)
        if failed >= self._config.max_failed_starts:
            return Note(Reason.FAILED_STARTS, f"the process did not survive {failed} starts with it")
        self._starts.begin(name, digest)
        try:
            opened = await self._open(name, digest)
        except EdgewardError as e:
            self._starts.survived(name, digest)
            return Note(e.reason, e.what)
        except asyncio.CancelledError:
            self._starts.abandoned(name, digest)
            raise
        self._starts.survived(name, digest)
        return opened

    async def _load(self, name: str, slot: _Slot, digest: str) -> Version:
        if slot.serving is not None and slot.serving.digest == digest:
            slot.note = None
            return slot.serving
        if slot.draining is not None:
            await slot.draining
        try:
            opened = await self._open(name, digest)
        except EdgewardError as e:
            _log.error("%s %s does not load: %s", name, digest[:12], e)
            raise
        self._starts.survived(name, digest)
        slot.note = None
        return self._flip(slot, opened)

    async def _open(self, name: str, digest: str) -> Opened:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader, self._open_now, name, digest)

    def _open_now(self, name: str, digest: str) -> Opened:
        """In the loader's thread. A load that hangs cannot be interrupted, so it ends the process.

        At a start, that is one that the version did not survive.
        """
        self._loading = True
        try:
            with deadman.loading(self._config.load_timeout_s):
                return open_version(self._layout, name, digest)
        except MemoryError as e:
            raise DeviceUnfit(
                Reason.MEMORY_TOO_SMALL,
                f"{name} {digest[:12]} does not fit into memory beside what runs",
                "deploy a smaller version, or serve fewer models on this device",
            ) from e
        finally:
            self._loading = False

    def _flip(self, slot: _Slot, opened: Opened) -> Version:
        new = Version(opened)
        self._retire(slot)
        slot.serving, slot.digest = new, new.digest
        _log.info("serving %s", new.label)
        return new

    def _retire(self, slot: _Slot) -> None:
        old, slot.serving = slot.serving, None
        if old is not None:
            slot.retired = old.counters
            slot.draining = asyncio.create_task(self._drain(old))

    async def _drain(self, old: Version) -> None:
        if not await old.drained(self._config.drain_timeout_s):
            _log.error(
                "%s still has requests after %g s; its memory stays until they end",
                old.label,
                self._config.drain_timeout_s,
            )
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._loader, _let_go, old)


def _let_go(old: Version) -> None:
    old.model.close()
    heap.give_back()


def _entry(name: str, slot: _Slot) -> dict[str, str]:
    return {
        "name": name,
        "version": slot.serving.manifest.version if slot.serving else "",
        "state": "READY" if slot.serving else "UNAVAILABLE",
        "reason": slot.note.reason.value if slot.note else "",
        "detail": slot.note.detail if slot.note else "",
        "digest": slot.digest,
        "form": slot.serving.form if slot.serving else "",
    }


def _target(link: Path) -> str | None:
    """The digest a link names. One that cannot be read must not keep other models from starting."""
    try:
        return files.link_target(link)
    except StorageFault as e:
        _log.error("%s", e)
        return None


def _unknown(what: str, next_step: str) -> RequestRejected:
    return RequestRejected(404, Reason.UNKNOWN_MODEL, what, next_step)


def _is_name(text: str) -> bool:
    try:
        canonical.from_builtins(text, Name)
    except canonical.DecodeFault:
        return False
    return True
