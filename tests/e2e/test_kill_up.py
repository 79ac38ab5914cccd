"""`edge-agent up` itself: it holds the sockets, restarts what falls over, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.e2e.conftest import MakeSite, Site
from tests.support.device import Device, alive
from tests.support.waiting import wait_for


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_site()


def sockets(device: Device) -> list[str]:
    return sorted(p.name for p in device.layout.run.glob("*.sock"))


def refuses_connections(device: Device) -> bool:
    host, port = device.tcp.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_in_order(site: Site, number: int) -> None:
    device = site.device
    pids = device.pids()
    assert len(pids) >= 3  # besides, the registry is asked for keys
    assert sockets(device) == ["control.sock", "inference.sock"]
    assert device.process is not None
    device.process.send_signal(number)
    assert device.process.wait(15) == 0
    assert [pid for pid in pids if alive(pid)] == []
    assert sockets(device) == []
    assert refuses_connections(device)
    site.operator.wait(lambda: (p := site.operator.presence) and p.status == "offline", "the farewell")
    assert "Traceback" not in device.log


def test_a_signal_ends_a_child_that_hangs(make_site: MakeSite, name: str) -> None:
    site = make_site(update={"preflight_timeout_s": 600.0})
    site.desire(site.publish(name, 1, fault="hang"))
    child = site.device.pid("preflight", timeout_s=20)
    pids = {*site.device.pids(), child}
    assert site.device.stop() == 0
    wait_for(lambda: not any(alive(pid) for pid in pids), "the end of all", timeout_s=5)


def test_a_killed_supervisor_takes_everything_with_it(make_site: MakeSite, name: str) -> None:
    site = make_site(update={"preflight_timeout_s": 600.0})
    site.desire(site.publish(name, 1, fault="hang"))
    child = site.device.pid("preflight", timeout_s=20)
    pids = {*site.device.pids(), child}
    assert len(pids) == 4
    site.device.kill()
    wait_for(lambda: not any(alive(pid) for pid in pids), "the end of all", timeout_s=10)
    assert refuses_connections(site.device)
    site.device.start()  # what it left behind is no obstacle
    site.device.wait_serving()


def test_what_falls_over_at_once_is_restarted_with_growing_pauses(make_site: MakeSite) -> None:
    site = make_site()
    device = site.device
    times = []
    for _ in range(3):
        pid = device.kill_one("run")
        begun_s = time.monotonic()
        wait_for(lambda p=pid: [q for q in device.pids("run") if q != p], "the next one")  # type: ignore[misc]
        times.append(time.monotonic() - begun_s)
    assert times[0] < 1.0
    assert times[2] > times[0]
    assert "`run` ended (killed by SIGKILL)" in device.log


def test_sockets_are_for_whom_they_are_for(site: Site) -> None:
    modes = {name: (site.device.layout.run / name).stat().st_mode & 0o777 for name in sockets(site.device)}
    assert modes == {"control.sock": 0o600, "inference.sock": 0o660}


def test_a_second_one_on_the_same_folders_is_refused_and_harms_nothing(site: Site) -> None:
    device = site.device
    command = [sys.executable, "-m", "edge_agent", "up", "--config", str(device.config_path)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert second.returncode == 6
    assert second.stderr.strip().splitlines() == [second.stderr.strip()]
    assert "another `edge-agent up`" in second.stderr
    assert "[not_allowed] →" in second.stderr
    assert sockets(device) == ["control.sock", "inference.sock"]
    device.wait_serving()
    command[3] = "run"
    third = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert third.returncode == 6
    assert "another control process" in third.stderr


def test_a_port_that_is_taken_is_named(make_site: MakeSite) -> None:
    site = make_site(start="")
    host, port = site.device.tcp.split(":")
    command = [sys.executable, "-m", "edge_agent", "up", "--config", str(site.device.config_path)]
    with socket.create_server((host, int(port))):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 6
    assert f"cannot listen on {site.device.tcp}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert sockets(site.device) == []


def test_looking_at_the_status_never_keeps_the_control_process_from_starting(site: Site) -> None:
    """`edge-agent status` tries the lock for an instant, which must not be mistaken for a second agent."""
    device = site.device
    looking = [sys.executable, "-c", _LOOK, str(device.config_path)]
    with subprocess.Popen(looking) as looker:
        for _ in range(2):
            pid = device.kill_one("run")
            wait_for(lambda p=pid: [q for q in device.pids("run") if q != p], "the next one")  # type: ignore[misc]
            time.sleep(0.7)
        os.kill(looker.pid, signal.SIGTERM)
    assert "another control process" not in device.log


_LOOK = """
import sys
from pathlib import Path
from edge_agent import config, status
found = config.load(Path(sys.argv[1]))
while True:
    status.collect(found)
"""
