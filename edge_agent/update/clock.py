"""The time by which orders expire: this device's clock, or the registry's last signature where that is later.

It reads the floor that the fetch child writes, and tells what is wrong with clock and floor, each once.
"""

from __future__ import annotations

from edge_agent import files
from edge_agent.layout import Layout
from edge_agent.update import levels
from edge_agent.update.floor import metadata_floor
from edge_contract.errors import Reason, StorageFault
from edge_contract.wire import Event

# Clocks drift; below this a clock counts as right.
TOLERANCE_S = 60.0
Stamps = tuple[tuple[int, int, int], ...]


class TrustedClock:
    """Owned by the control loop's thread. Without a readable floor, the local clock is all there is."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._stamps: Stamps = ()
        self._floor = levels.MetadataFloor()
        self._told: set[str] = set()
        self._behind = False
        self._found = self._read()  # before the first order can come

    def now_ms(self, clock_ms: int) -> int:
        """The time for decisions on expiry."""
        return max(clock_ms, self._floor.at_s * 1000)

    def look(self, clock_ms: int) -> list[Event]:
        """Read the floor again if it has changed; what there is to report."""
        events = [
            Event(clock_ms, "storage", reason=Reason.STORAGE_FAULT, detail=problem)
            for problem in (*self._found, *self._read())
            if problem not in self._told
        ]
        self._found = []
        self._told.update(event.detail for event in events)
        behind_s = levels.behind_s(clock_ms / 1000, self._floor)
        if (behind_s > TOLERANCE_S) != self._behind:
            self._behind = behind_s > TOLERANCE_S
            events.append(_about_clock(clock_ms, behind_s if self._behind else 0.0))
        return events

    def _read(self) -> list[str]:
        stamps = tuple(files.stamp(path) for path in self._layout.floor_copies("metadata"))
        if stamps == self._stamps:
            return []
        try:
            floor = metadata_floor(self._layout)
        except StorageFault as e:
            return [e.what]
        self._stamps, self._floor = stamps, floor.value
        return floor.problems


def behind_text(behind_s: float) -> str:
    """For people."""
    days, hours = divmod(int(behind_s // 3600), 24)
    span = f"{days:,} days" if days else f"{hours} hours" if hours else f"{behind_s / 60:.0f} minutes"
    return f"this device's clock is behind by {span} or more; the time of the registry is used for expiry"


def _about_clock(clock_ms: int, behind_s: float) -> Event:
    if behind_s:
        return Event(clock_ms, "clock", reason=Reason.CLOCK_BEHIND, detail=behind_text(behind_s))
    return Event(clock_ms, "clock", detail="this device's clock is no longer behind")
