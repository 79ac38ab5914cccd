"""Whether bytes may be fetched now: the maintenance window and the metered link. It fetches nothing.

The link is metered when the configuration says so, or while the file `metered` lies in the run folder: a
hook of NetworkManager, ModemManager or a person puts it there and takes it away. This process could not ask
NetworkManager itself without D-Bus.
"""

from __future__ import annotations

import time

from edge_agent.config import Registry
from edge_agent.layout import Layout
from edge_agent.update import window
from edge_agent.update.answers import Postponed
from edge_contract.errors import Reason

# A link that is metered no longer is noticed within so long.
_METERED_AGAIN_S = 300.0


def opens_in_s(found: window.Window | None) -> tuple[int, str]:
    """Seconds until a window opens by this device's clock (0: it is open), and what the clock says."""
    if found is None:
        return 0, ""
    now = time.gmtime() if found.utc else time.localtime()
    zone = "UTC" if found.utc else "local time"
    wait_s = window.opens_in_s(found, now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec)
    return wait_s, f"{now.tm_hour:02}:{now.tm_min:02} {zone}"


class Gate:
    """Asked before the first byte, and about once a second while bytes come."""

    def __init__(self, registry: Registry, layout: Layout) -> None:
        self._registry = registry
        self._window = window.parse(registry.window)
        self._switch = layout.metered

    def check(self, missing_bytes: int) -> None:
        """Raises Postponed when `missing_bytes` may not come now."""
        if missing_bytes:
            self._check_window()
            self._check_metered(missing_bytes)

    def _check_window(self) -> None:
        wait_s, clock = opens_in_s(self._window)
        if wait_s:
            raise Postponed(
                Reason.OUTSIDE_WINDOW,
                f"it is {clock}, downloads wait for {self._registry.window}",
                "nothing to do: it goes on by itself; the window is [registry] window",
                float(wait_s),
            )

    def _check_metered(self, missing_bytes: int) -> None:
        if missing_bytes <= self._registry.metered_max_bytes:
            return
        setting = self._registry.metered
        if setting == "yes" or (setting == "auto" and self._switch.exists()):
            why = "[registry] metered says so" if setting == "yes" else f"{self._switch} is there"
            raise Postponed(
                Reason.METERED,
                f"{missing_bytes} bytes are missing and the link is metered ({why}), which allows "
                f"{self._registry.metered_max_bytes}",
                "it goes on by itself once the link is not metered; or raise [registry] metered_max_bytes",
                _METERED_AGAIN_S,
            )
