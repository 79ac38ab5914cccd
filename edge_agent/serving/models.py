"""The set of models this process serves: one pointer per model, flipped when a new version is ready.

It decides which version a request gets and when an old one is let go. It does not run requests
(admission.py) and does not choose versions: the disk's links and the control process do.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from dataclasses import dataclass

from edge_agent import files
from edge_agent.config import Serving
from edge_agent.layout import Layout
from edge_agent.serving.loader import Opened
from edge_agent.serving.metrics import VersionCounters
from edge_agent.serving.opener import Note, Opener
from edge_agent.serving.version import Version
from edge_contract import canonical
from edge_contract.errors import EdgewardError, Reason, RequestRejected, StorageFault
from edge_contract.manifest import Name

_log = logging.getLogger("edge_agent.serving")


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
        self._opener = Opener(layout, config)
        self._slots: dict[str, _Slot] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._retries: dict[str, asyncio.Task[None]] = {}
        self.started = False

    async def start(self) -> None:
        """Load what the disk names, model by model. What does not load is noted, and tried again later.

        Raises StorageFault when the disk does not give the names.
        """
        for name in self._names():
            await self._start(name)
        self.started = True

    async def load(self, name: str, digest: str | None = None, *, original: bool = False) -> Version:
        """Serve `digest` (default: what the disk names) as `name`; returns once new requests reach it.

        With `original` from the model of the bundle, also when this version serves in another form. The
        version before serves until then, and stays if this raises: RequestRejected, BundleRejected,
        DeviceUnfit or StorageFault.
        """
        async with self._locks[name]:
            slot = self._slots.get(name) or _Slot()
            if digest is None and slot.serving is None and self._named(name):
                await self._start(name, late=True)  # with its counts and its ways out, as at every start
                return self.find(name, None)
            version = await self._load(name, slot, digest or self._named(name), original=original)
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
        return self._opener.busy

    def close(self) -> None:
        """The process ends: load nothing more, and leave what is draining to the end of the process."""
        for slot in self._slots.values():
            if slot.draining is not None:
                slot.draining.cancel()
        for retry in self._retries.values():
            retry.cancel()
        self._opener.close()

    def _names(self) -> list[str]:
        """Models that have a link, or one that cannot be read."""
        return [n for n in files.names(self._layout.models) if _is_name(n) and self._links(n) != []]

    def _links(self, name: str) -> list[str] | Note:
        """The digests that the disk names, `current` first, or why nobody knows what is to serve."""
        try:
            current = files.link_target(self._layout.current(name))
        except StorageFault as e:
            return Note(e.reason, e.what)
        previous = None
        try:
            previous = files.link_target(self._layout.previous(name))
        except StorageFault as e:
            _log.error("%s", e)  # then there is none to fall back to
        return list(dict.fromkeys(d for d in (current, previous) if d))

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

    async def _start(self, name: str, *, late: bool = False) -> None:
        """Serve what the disk names, or the version before; see to it later where neither loads.

        What no start was survived with waits for that: other models are to serve first. Then (`late`) it is
        tried all the same, for it may have been the power that failed.
        """
        slot = self._slots.setdefault(name, _Slot())
        digests = self._links(name)
        if isinstance(digests, Note):
            slot.note, digests = digests, []
            _log.error("%s is not loaded: %s", name, slot.note.detail)
        elif not digests:
            del self._slots[name]
            return
        notes = {d: note for d in digests if (note := self._opener.struck_out(name, d)) is not None}
        for digest in [d for d in digests if d not in notes] + (list(notes) if late else []):
            outcome = await self._opener.start(name, digest)
            if isinstance(outcome, Opened):
                slot.note = notes.get(digests[0]) if digest != digests[0] else None
                self._flip(slot, outcome)
                break
            notes[digest] = outcome
        for digest, note in notes.items():
            _log.error("%s %s does not start: %s [%s]", name, digest[:12], note.detail, note.reason)
        if slot.serving is None:
            slot.digest, slot.note = (digests[0], notes[digests[0]]) if digests else ("", slot.note)
            if name not in self._retries or self._retries[name].done():
                self._retries[name] = asyncio.create_task(self._retry(name))

    async def _retry(self, name: str) -> None:
        """Try it again, after growing pauses, until it serves or is gone."""
        for tries in itertools.count():
            digests = self._links(name)
            known = [] if isinstance(digests, Note) else digests
            await asyncio.sleep(self._opener.pause_s(name, known, tries))
            async with self._locks[name]:
                if name in self._slots and self._slots[name].serving is None:
                    await self._start(name, late=True)
                if name not in self._slots or self._slots[name].serving is not None:
                    return

    async def _load(self, name: str, slot: _Slot, digest: str, *, original: bool) -> Version:
        found = slot.serving
        if found is not None and found.digest == digest and not (original and found.form != "original"):
            slot.note = None
            return found
        if slot.draining is not None:
            await slot.draining
        try:
            opened = await self._opener.open(name, digest, original=original)
        except EdgewardError as e:
            _log.error("%s %s does not load: %s", name, digest[:12], e)
            raise
        self._opener.survived(name, digest)
        slot.note = None
        return self._flip(slot, opened)

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
        await self._opener.let_go(old)


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


def _unknown(what: str, next_step: str) -> RequestRejected:
    return RequestRejected(404, Reason.UNKNOWN_MODEL, what, next_step)


def _is_name(text: str) -> bool:
    try:
        canonical.from_builtins(text, Name)
    except canonical.DecodeFault:
        return False
    return True
