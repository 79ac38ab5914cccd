"""All models of the device: the desired set, persisted as it came, and one driver per model.

It decides nothing about a single model (driver.py) and nothing about signatures (edge_contract.wire).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_agent import files
from edge_agent.config import Config
from edge_agent.inference import InferenceClient, Loaded
from edge_agent.layout import Layout
from edge_agent.update import journal
from edge_agent.update.driver import ModelDriver, Tools, raise_releases
from edge_agent.update.floor import order_floor
from edge_agent.update.journal import NO_PERMISSIONS, Permissions, Ref
from edge_agent.update.levels import with_generation
from edge_agent.update.rejected import Rejected
from edge_agent.update.store import Store
from edge_contract import canonical, wire
from edge_contract.errors import MessageRejected, Reason


class Updater:
    """Owned by the control loop's thread."""

    def __init__(
        self, config_path: Path, config: Config, report: Callable[[wire.Event], None], now_ms: int
    ) -> None:
        self._layout = Layout(config)
        self._store = Store(self._layout)
        self.rejected = Rejected(self._layout, now_ms)
        self._orders = order_floor(self._layout)
        self._tools = Tools(
            config_path=config_path,
            config=config.update,
            layout=self._layout,
            store=self._store,
            inference=InferenceClient(self._layout.control_socket),
            rejected=self.rejected,
            orders=self._orders,
            report=report,
            in_use=self._in_use,
        )
        known = {*journal.names(self._layout), *self._store.names()}
        self._drivers = {name: ModelDriver(self._tools, name, now_ms) for name in sorted(known)}
        for problem in (self.rejected.problem, *self._orders.problems):
            if problem:
                report(wire.Event(now_ms, "storage", reason=Reason.STORAGE_FAULT, detail=problem))
        self.adopted = 0
        self._adopt_stored(report, now_ms)
        self._settle_floor()
        self._store.collect(self._in_use())  # what a kill left between a journal and its clean-up

    @property
    def generation(self) -> int:
        """The newest generation ever accepted; `adopted` is lower where its desired state was lost."""
        return max(self.adopted, self._orders.value.generation)

    def accept(self, desired: wire.Desired, now_ms: int) -> None:
        """Make a verified desired state this device's own: durable first, then acted upon."""
        files.write(self._layout.desired, canonical.to_bytes(desired))
        self._orders.raise_to(with_generation(self._orders.value, desired.generation))
        self._adopt(desired, now_ms)

    def rollback(self, name: str) -> Ref:
        """An operator's rollback; returns the version that will serve. Raises MessageRejected."""
        driver = self._drivers.get(name)
        if driver is None:
            known = ", ".join(sorted(self._drivers)) or "none"
            raise MessageRejected(
                Reason.UNKNOWN_MODEL, f"no model {name!r} on this device; it has {known}", "name one of these"
            )
        return driver.rollback(Reason.OPERATOR_ROLLBACK, "an operator asked for the version before")

    def current(self, name: str) -> Ref | None:
        """What the disk says serves as `name`."""
        return self._store.current(name)

    def notice(self, loaded: list[Loaded]) -> None:
        """Compare what the inference process serves with the disk: it may have fallen back by itself."""
        for entry in loaded:
            driver = self._drivers.get(entry.name)
            fell_back = entry.ready and entry.reason is not Reason.OK
            if fell_back and driver is not None and driver.is_previous(entry.digest):
                driver.rollback(entry.reason, "it did not start here; the version before serves")

    def tick(self, now_ms: int) -> None:
        """Let every machine take its next step."""
        for name, driver in list(self._drivers.items()):
            driver.tick(now_ms)
            if driver.gone:
                files.remove_link(self._layout.journal_file(name))
                del self._drivers[name]

    def stop(self) -> None:
        """End all children."""
        for driver in self._drivers.values():
            driver.stop()

    def views(self) -> list[wire.ModelState]:
        """What is reported, by name."""
        return [driver.view() for _, driver in sorted(self._drivers.items())]

    def _adopt(self, desired: wire.Desired, now_ms: int) -> None:
        wanted = {m.name: Ref(m.version, m.manifest_sha256) for m in desired.models}
        allowed = {m.name: Permissions(m.allow_downgrade, m.allow_interface_change) for m in desired.models}
        new = {n: ModelDriver(self._tools, n, now_ms) for n in wanted if n not in self._drivers}
        self._drivers |= new
        for name, driver in self._drivers.items():
            driver.want(wanted.get(name), desired.generation, allowed.get(name, NO_PERMISSIONS))
        # Last, so that a fault above leaves the message to be accepted when it comes again.
        self.adopted = desired.generation

    def _adopt_stored(self, report: Callable[[wire.Event], None], now_ms: int) -> None:
        data = files.read(self._layout.desired)
        if data is None:
            return
        try:
            self._adopt(canonical.from_bytes(data, wire.Desired), now_ms)
        except canonical.DecodeFault as e:
            aside = files.set_aside(self._layout.desired, now_ms)
            detail = f"the stored desired state was damaged ({e}) and set aside as {aside.name}"
            report(wire.Event(now_ms, "storage", reason=Reason.STORAGE_FAULT, detail=detail))

    def _settle_floor(self) -> None:
        """What a kill left between a desired state and the floor, and what a lost floor should say."""
        self._orders.repair()
        self._orders.raise_to(with_generation(self._orders.value, self.adopted))
        known = self._orders.value.releases
        unknown = [n for n, d in self._drivers.items() if d.view().state == "idle" and n not in known]
        links = {n: (self._store.current(n), self._store.previous(n)) for n in unknown}
        there = {n: [ref for ref in refs if ref is not None] for n, refs in links.items()}
        raise_releases(self._orders, self._store, there)

    def _in_use(self) -> set[str]:
        return set().union(*(driver.in_use for driver in self._drivers.values()))
