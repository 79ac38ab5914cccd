"""All models of the device: the desired set, persisted as it came, and one driver per model.

It decides nothing about a single model (driver.py) and nothing about signatures (edge_contract.wire).
What a disk does not give at the start (full, read-only, out of order) keeps nothing else from working: it
is reported and tried again until the disk gives it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from edge_agent import files, sealed
from edge_agent.config import Config
from edge_agent.inference import InferenceClient, Loaded
from edge_agent.layout import Layout
from edge_agent.update import journal
from edge_agent.update.driver import ModelDriver, Tools
from edge_agent.update.floor import order_floor
from edge_agent.update.journal import NO_PERMISSIONS, Permissions, Ref
from edge_agent.update.levels import with_generation
from edge_agent.update.recheck import Recheck
from edge_agent.update.rejected import Rejected
from edge_agent.update.releases import raise_releases
from edge_agent.update.reload import Reload
from edge_agent.update.remake import Remake
from edge_agent.update.store import Store
from edge_contract import wire
from edge_contract.errors import MessageRejected, Reason, StorageFault

log = logging.getLogger("edge_agent.update")

_STORAGE_PAUSE_S = 2.0


class Updater:
    """Owned by the control loop's thread."""

    def __init__(
        self, config_path: Path, config: Config, report: Callable[[wire.Event], None], now_ms: int
    ) -> None:
        self._layout = Layout(config)
        self._store = Store(self._layout)
        self._report = report
        self.rejected = Rejected(self._layout, now_ms)
        self._orders = order_floor(self._layout)
        self._tools = Tools(
            config_path=config_path,
            config=config.update,
            fetch_deadline_s=config.registry.deadline_s,
            layout=self._layout,
            store=self._store,
            inference=InferenceClient(self._layout.control_socket),
            rejected=self.rejected,
            orders=self._orders,
            report=report,
            collect=self._collect,
        )
        self._drivers: dict[str, ModelDriver] = {}
        self._remake = Remake(self._layout, self._store, config.update)
        self._reload = Reload(self._layout, self._tools.inference)
        self._desired: wire.Desired | None = None
        self._unwritten: wire.Desired | None = None
        self._unread: list[Callable[[int], None]] = [
            self._make_folders,
            self._clear_models,
            self._read_journals,
            self._read_desired,
            self._settle_floor,
            self._clean,
        ]
        self._recheck = Recheck(self._layout, config.update.recheck_s)
        self._blind: dict[str, str] = {}
        self._told: set[str] = set()
        self._resume_s = 0.0
        self.adopted = 0
        for problem in (self.rejected.problem, *self._orders.problems):
            if problem:
                self._tell(problem, now_ms)
        self._recover(now_ms)

    @property
    def generation(self) -> int:
        """The newest generation ever accepted; `adopted` is lower where its desired state was lost."""
        return max(self.adopted, self._orders.value.generation)

    def accept(self, desired: wire.Desired, now_ms: int) -> None:
        """Make a verified desired state this device's own: durable first, then acted upon.

        A disk that does not take it now is asked again at each tick, for the message may not come again.
        """
        self._unwritten = desired
        if self._write_desired not in self._unread:
            self._unread.insert(0, self._write_desired)
        self._recover(now_ms)

    def rollback(self, name: str, now_ms: int) -> Ref:
        """An operator's rollback; returns the version that will serve, once the journal says so.

        Raises MessageRejected, or StorageFault when the journal cannot be written.
        """
        driver = self._drivers.get(name)
        if driver is None:
            known = ", ".join(sorted(self._drivers)) or "none"
            raise MessageRejected(
                Reason.UNKNOWN_MODEL, f"no model {name!r} on this device; it has {known}", "name one of these"
            )
        return driver.rollback(Reason.OPERATOR_ROLLBACK, "an operator asked for the version before", now_ms)

    def current(self, name: str) -> Ref | None:
        """What the disk says serves as `name`. Raises StorageFault when it does not say."""
        return self._store.current(name)

    def notice(self, loaded: list[Loaded], now_ms: int) -> None:
        """Compare what the inference process serves with the disk: it may have fallen back by itself.

        Raises StorageFault; it is noticed again.
        """
        self._remake.notice(loaded)
        entries = {entry.name: entry for entry in loaded}
        for name, driver in self._drivers.items():
            entry = entries.get(name)
            driver.noticed(entry, now_ms)
            if entry is not None and entry.reason is not Reason.OK:
                driver.fell_back(entry.digest if entry.ready else "", entry.reason, now_ms)
        self._reload.notice(loaded, [name for name, driver in self._drivers.items() if driver.unserved])

    def tick(self, now_ms: int) -> None:
        """Let every machine take its next step."""
        if time.monotonic() >= self._resume_s:
            self._recover(now_ms)
        try:
            self._look_again(now_ms)
        except StorageFault as e:
            self._tell(str(e), now_ms)
        for name, driver in list(self._drivers.items()):
            driver.tick(now_ms)
            if driver.gone:
                self._forget(name, now_ms)
        self._remake.tick(idle=all(driver.idle for driver in self._drivers.values()))

    def hurry(self) -> None:
        """Blobs came by hand: whoever waits for them need not wait longer."""
        for driver in self._drivers.values():
            driver.hurry()

    def stop(self) -> None:
        """End all children."""
        self._recheck.stop()
        self._remake.stop()
        for driver in self._drivers.values():
            driver.stop()

    def views(self) -> list[wire.ModelState]:
        """What is reported, by name."""
        views = {name: driver.view() for name, driver in self._drivers.items()}
        for name, problem in self._blind.items():
            views[name] = wire.ModelState(name, "idle", reason=Reason.STORAGE_FAULT, detail=problem)
        return [view for _, view in sorted(views.items())]

    def _look_again(self, now_ms: int) -> None:
        named = (digest for name in self._drivers for digest in self._store.named(name) if digest)
        for found in self._recheck.poll(named, now_ms):
            if found.form:
                self._tell(found.detail, now_ms)
                self._reload.decayed(found.digest)
                self._remake.again(found.digest)
                continue
            if not found.damaged:
                self._tell(found.detail, now_ms)
                continue
            for driver in self._drivers.values():
                driver.found_damaged(found.digest, found.detail, found.begun_s, now_ms)

    def _forget(self, name: str, now_ms: int) -> None:
        try:
            files.remove_link(self._layout.journal_file(name))
        except StorageFault as e:
            self._tell(str(e), now_ms)  # it is gone all the same; the file is found at the next start
        del self._drivers[name]

    def _recover(self, now_ms: int) -> None:
        """What could not be read or written yet. What nothing names is removed only when all is known."""
        for part in list(self._unread):
            if part == self._clean and self._unread != [part]:
                return
            try:
                part(now_ms)
            except StorageFault as e:
                self._hold(e, now_ms)
            else:
                self._unread.remove(part)

    def _hold(self, fault: StorageFault, now_ms: int) -> None:
        self._resume_s = time.monotonic() + min(_STORAGE_PAUSE_S, self._tools.config.retry_s)
        self._tell(str(fault), now_ms)

    def _tell(self, detail: str, now_ms: int) -> None:
        """Report a fault of the disk, once in the life of this process."""
        if detail not in self._told:
            self._told.add(detail)
            self._report(wire.Event(now_ms, "storage", reason=Reason.STORAGE_FAULT, detail=detail))

    def _make_folders(self, now_ms: int) -> None:
        try:
            self._store.make_folders()
        except StorageFault as e:
            self._tell(str(e), now_ms)  # what is there is enough to serve and to read

    def _clear_models(self, now_ms: int) -> None:
        for aside in self._store.clear_models(now_ms):
            self._tell(f"in models, what was no folder is set aside as {aside}", now_ms)

    def _read_journals(self, now_ms: int) -> None:
        """One driver per model; one that cannot be read now must not hold up the others."""
        wanted = {m.name for m in self._desired.models} if self._desired else set()
        for name in sorted(
            {*journal.names(self._layout), *self._store.names(), *wanted} - set(self._drivers)
        ):
            try:
                self._drivers[name] = ModelDriver(self._tools, name, now_ms)
                self._blind.pop(name, None)
            except StorageFault as e:
                self._blind[name] = str(e)
        self._want()
        if self._blind:
            raise StorageFault(
                Reason.STORAGE_FAULT, f"journals cannot be read: {', '.join(self._blind)}", "repair the disk"
            )

    def _read_desired(self, now_ms: int) -> None:
        found = sealed.read_or_set_aside(self._layout.desired, wire.Desired, now_ms)
        if isinstance(found, sealed.Damaged):
            self._tell(f"the stored desired state {found.what}", now_ms)
        elif found is not None and found.generation > self.adopted:
            self._adopt(found, now_ms)

    def _clean(self, now_ms: int) -> None:  # noqa: ARG002 - the shape of a part of the start
        """What a kill left between a journal and its clean-up."""
        self._store.clean()
        self._store.collect(self._in_use())

    def _collect(self, now_ms: int) -> None:
        """An attempt is over: drop what nothing names any more, now or when the disk can."""
        if self._clean not in self._unread:
            self._unread.append(self._clean)
        if time.monotonic() >= self._resume_s:
            self._recover(now_ms)

    def _write_desired(self, now_ms: int) -> None:
        desired, known = self._unwritten, self._orders.known()
        if desired is not None and desired.generation >= known.generation:
            sealed.write(self._layout.desired, desired)
            self._orders.raise_to(with_generation(known, desired.generation))
            self._adopt(desired, now_ms)
        self._unwritten = None

    def _adopt(self, desired: wire.Desired, now_ms: int) -> None:
        self._desired, self.adopted = desired, desired.generation
        self._reload.hurry()
        if self._read_journals not in self._unread:
            try:
                self._read_journals(now_ms)
            except StorageFault as e:
                self._unread.insert(0, self._read_journals)
                self._hold(e, now_ms)
        self._want()

    def _want(self) -> None:
        """Tell every driver what the desired state says of its model."""
        desired = self._desired
        if desired is None:
            return
        wanted = {m.name: Ref(m.version, m.manifest_sha256) for m in desired.models}
        allowed = {m.name: Permissions(m.allow_downgrade, m.allow_interface_change) for m in desired.models}
        for name, driver in self._drivers.items():
            driver.want(wanted.get(name), desired.generation, allowed.get(name, NO_PERMISSIONS))

    def _settle_floor(self, now_ms: int) -> None:  # noqa: ARG002 - the shape of a part of the start
        """What a kill left between a desired state and the floor, and what a lost floor should say."""
        known = self._orders.known().releases
        self._orders.repair()
        known_to_journals = max((d.generation for d in self._drivers.values()), default=0)
        generation = max(self.adopted, known_to_journals)
        self._orders.raise_to(with_generation(self._orders.value, generation))
        unknown = [n for n, d in self._drivers.items() if d.view().state == "idle" and n not in known]
        links = {n: (self._store.current(n), self._store.previous(n)) for n in unknown}
        there = {n: [ref for ref in refs if ref is not None] for n, refs in links.items()}
        raise_releases(self._orders, self._store, there)

    def _in_use(self) -> set[str]:
        """Raises StorageFault while nobody knows what every model needs: then nothing may be removed."""
        unknown = self._read_journals in self._unread
        if unknown:
            raise StorageFault(
                Reason.STORAGE_FAULT, "a journal has not been read yet", "repair the disk; nothing is removed"
            )
        return set().union(*(driver.in_use for driver in self._drivers.values()))
