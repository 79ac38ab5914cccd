"""The maintenance window of what serves."""

from __future__ import annotations

import time

from edge_contract.errors import Reason
from tests.support.site import MakeSite


def clock(offset_s: int) -> str:
    return time.strftime("%H:%M", time.gmtime(time.time() + offset_s))


def test_what_serves_changes_in_the_window_only(make_site: MakeSite, name: str) -> None:
    site = make_site(update={"window": f"{clock(7200)}-{clock(10800)} UTC"})
    site.install(site.publish(name, 1))  # a first version waits for nothing
    v2 = site.publish(name, 2)
    site.desire(v2)
    site.wait_state(name, "preflight")

    def told() -> bool:
        model = site.operator.model(name)
        return model is not None and model.reason is Reason.OUTSIDE_WINDOW

    site.operator.wait(told, "the reason")
    assert site.device.layout.version(v2.digest).exists()
    assert site.device.model(name)["current"] == "1.0.0"
    assert site.device.pids("preflight") == []
    site.device.stop()
    site.device.configure(update={"window": f"{clock(-60)}-{clock(3600)} UTC"})
    site.device.start()
    site.device.wait_serving()
    assert site.operator.wait_settled(name, 40).outcome == "committed"
    assert site.device.model(name)["current"] == "2.0.0"
