"""The units: systemd finds nothing to complain about, and they agree with the programs they start."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.config import Config, host_port, load
from edge_agent.layout import Layout
from edge_agent.serving import sockets

UNITS = Path(__file__).parent.parent / "systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
SOCKETS = sorted(path.name for path in UNITS.glob("*.socket"))
TEMPLATES = {"edge-retry@.timer": "edge-retry@edge-agent.timer"}
# Exposure in tenths, as systemd-analyze counts it: 2.0 is well inside what it calls OK.
THRESHOLD = 20
PROGRAMS = Path(sys.executable).parent
DEFAULTS = Config(tenant="acme", device="line-3")

Unit = dict[str, dict[str, list[str]]]


def read(name: str) -> Unit:
    """Section → key → values, in order. Enough of the format for units without continuation lines."""
    unit: Unit = {}
    section: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        if line.startswith("["):
            section = unit.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return unit


def one(unit: Unit, section: str, key: str) -> str:
    (value,) = unit[section][key]
    return value


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)(ms|s|min)", text)
    assert match, text
    return int(match[1]) * {"ms": 0.001, "s": 1, "min": 60}[match[2]]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine's root folder with our units and program where a device has them, and systemd's own units."""
    installed = tmp_path / "root"
    (installed / "usr/lib/systemd").mkdir(parents=True)
    shutil.copytree("/usr/lib/systemd/system", installed / "usr/lib/systemd/system", symlinks=True)
    shutil.copytree(UNITS, installed / "etc/systemd/system", ignore=shutil.ignore_patterns("*.d"))
    (installed / "opt/edgeward/bin").mkdir(parents=True)
    shutil.copy(PROGRAMS / "edge-agent", installed / "opt/edgeward/bin")
    return installed


def verify(root: Path, name: str) -> str:
    """What `systemd-analyze verify` prints. Its exit code is no help: it is 0 for ignored mistakes."""
    return run("systemd-analyze", "verify", "--recursive-errors=yes", f"--root={root}", name).stdout


# --- what systemd says ---


@pytest.mark.parametrize("name", [*SERVICES, *SOCKETS, *TEMPLATES])
def test_verify_prints_nothing(root: Path, name: str) -> None:
    assert verify(root, TEMPLATES.get(name, name)) == ""


def test_verify_would_print_mistakes(root: Path) -> None:
    unit = root / "etc/systemd/system/edge-agent.service"
    unit.write_text(unit.read_text().replace("MemoryMax=", "MemoryMaximum="))
    (root / "opt/edgeward/bin/edge-agent").unlink()
    said = verify(root, unit.name)
    assert "Unknown key name 'MemoryMaximum'" in said or "Unknown key 'MemoryMaximum'" in said
    assert "/opt/edgeward/bin/edge-agent is not executable" in said


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_sandboxed(name: str) -> None:
    done = run("systemd-analyze", "security", "--offline=true", f"--threshold={THRESHOLD}", UNITS / name)
    assert done.returncode == 0, done.stdout


def test_the_threshold_would_catch_a_loose_unit(tmp_path: Path) -> None:
    loose = tmp_path / "loose.service"
    loose.write_text("[Service]\nExecStart=/bin/true\n")
    done = run("systemd-analyze", "security", "--offline=true", f"--threshold={THRESHOLD}", loose)
    assert done.returncode != 0


# --- services ---


def test_the_example_configuration_is_one() -> None:
    assert load(UNITS / "agent.toml").state_dir == DEFAULTS.state_dir


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_starts_a_command_that_exists(name: str) -> None:
    program, command = one(read(name), "Service", "ExecStart").split()
    assert program == "/opt/edgeward/bin/edge-agent"
    done = run(PROGRAMS / "edge-agent", command, "--help")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_watched_limited_and_started_again(name: str) -> None:
    unit = read(name)
    for key in ("WatchdogSec", "MemoryHigh", "MemoryMax", "TasksMax", "OOMScoreAdjust", "RestartSec"):
        assert one(unit, "Service", key)
    assert one(unit, "Service", "Type") == "notify"
    assert one(unit, "Service", "Restart") == "always"
    # After the limit the retry timer takes over: the device is out of reach otherwise.
    assert one(unit, "Unit", "OnFailure") == "edge-retry@%N.timer"
    retry = read("edge-retry@.timer")
    assert one(retry, "Timer", "Unit") == "%i.service"
    limit_s = seconds(one(unit, "Unit", "StartLimitIntervalSec"))
    assert 0 < limit_s < seconds(one(retry, "Timer", "OnActiveSec"))


def test_the_start_counter_acts_before_systemd_gives_up() -> None:
    """Two versions may each fail their starts before something else is served."""
    burst = int(one(read("edge-inference.service"), "Unit", "StartLimitBurst"))
    assert burst > 2 * DEFAULTS.serving.max_failed_starts


def test_systemd_waits_longer_than_the_server_drains() -> None:
    unit = read("edge-inference.service")
    assert seconds(one(unit, "Service", "TimeoutStopSec")) > DEFAULTS.serving.drain_timeout_s


# --- sockets ---


def test_the_sockets_have_the_names_that_the_server_reads() -> None:
    names = [one(read(name), "Socket", "FileDescriptorName") for name in SOCKETS]
    assert sorted(names) == sorted(sockets.ROLES)


def test_the_service_takes_every_socket_and_no_other() -> None:
    service = read("edge-inference.service")
    assert sorted(one(service, "Service", "Sockets").split()) == SOCKETS
    assert sorted(one(service, "Install", "Also").split()) == SOCKETS
    assert {one(read(name), "Socket", "Service") for name in SOCKETS} == {"edge-inference.service"}


def test_the_sockets_are_where_the_default_configuration_looks() -> None:
    layout = Layout(DEFAULTS)
    listens = {
        one(read(name), "Socket", "FileDescriptorName"): one(read(name), "Socket", "ListenStream")
        for name in SOCKETS
    }
    assert listens == {
        sockets.HTTP: DEFAULTS.serving.tcp,
        sockets.LOCAL: str(layout.inference_socket),
        sockets.CONTROL: str(layout.control_socket),
    }
    assert host_port(listens[sockets.HTTP])[0] == "127.0.0.1"


def test_only_the_control_process_may_connect_to_the_control_socket() -> None:
    control, service = read("edge-inference-control.socket"), read("edge-agent.service")
    assert one(control, "Socket", "SocketMode") == "0600"
    assert one(control, "Socket", "SocketUser") == one(service, "Service", "User")
    assert one(read("edge-inference.service"), "Service", "User") != one(service, "Service", "User")


# --- users and folders ---


def test_every_user_and_group_of_the_units_is_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    done = run("systemd-sysusers", f"--root={tmp_path}", UNITS / "sysusers.d/edgeward.conf")
    assert done.returncode == 0, done.stdout
    users = {line.split(":")[0] for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    members = {
        line.split(":")[0]: line.split(":")[3].split(",")
        for line in (tmp_path / "etc/group").read_text().splitlines()
    }
    for name in (*SERVICES, *SOCKETS):
        unit = read(name)
        section = unit.get("Service") or unit["Socket"]
        assert {*section.get("User", []), *section.get("SocketUser", [])} <= users, name
        for key in ("Group", "SocketGroup", "SupplementaryGroups"):
            assert set(section.get(key, [])) <= set(members), name
    assert members["edge-agent"] == ["edge-inference"]
    assert "edge-clients" in members


def test_the_folders_are_made_with_their_modes(tmp_path: Path) -> None:
    """As this test's own user, who stands for all of theirs: who may become whom is not tested here."""
    user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(os.getgid())
    (tmp_path / "etc").mkdir()
    names = ("root", "edge-agent", "edge-inference")
    passwd = "".join(f"{n}:x:{user.pw_uid}:{group.gr_gid}::/:/bin/sh\n" for n in names)
    (tmp_path / "etc/passwd").write_text(passwd)
    (tmp_path / "etc/group").write_text("".join(f"{n}:x:{group.gr_gid}:\n" for n in names))
    done = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", UNITS / "tmpfiles.d/edgeward.conf")
    assert (done.returncode, done.stdout) == (0, "")

    def mode(path: str | Path) -> int:
        return stat.S_IMODE((tmp_path / str(path).lstrip("/")).stat().st_mode)

    layout = Layout(DEFAULTS)
    assert mode(layout.state) == 0o750
    assert mode(layout.starts) == mode(layout.spare_starts) == 0o2770
    assert mode(layout.trust) == mode(layout.staging) == 0o700
    assert mode(layout.run) == 0o755
    assert mode("/etc/edgeward") == 0o750
    assert mode("/etc/edgeward/private") == 0o500


def test_the_units_may_write_where_the_programs_write() -> None:
    layout = Layout(DEFAULTS)
    agent, inference = read("edge-agent.service"), read("edge-inference.service")
    assert one(agent, "Service", "StateDirectory") == layout.state.name
    assert one(agent, "Service", "ReadWritePaths") == str(layout.run)
    # The spare one is made by tmpfiles, which may not have run since an update.
    assert one(inference, "Service", "ReadWritePaths") == f"{layout.starts} -{layout.spare_starts}"
    assert "StateDirectory" not in inference["Service"]


# --- socket activation and notification, by systemd's own tool ---


@contextmanager
def activated(tmp_path: Path, port: int, notify: Path) -> Iterator[None]:
    """`edge-agent serve` behind systemd-socket-activate, with the sockets and names of the units."""
    config = tmp_path / "agent.toml"
    config.write_text(
        f'tenant = "acme"\ndevice = "line-3"\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n'
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "state").mkdir()
    listens = {
        "http": f"127.0.0.1:{port}",
        "local": f"{tmp_path}/run/l.sock",
        "control": f"{tmp_path}/run/c.sock",
    }
    command = ["systemd-socket-activate", f"--fdname={':'.join(listens)}"]
    command += [f"--listen={address}" for address in listens.values()]
    command += [f"--setenv=NOTIFY_SOCKET={notify}", "--setenv=WATCHDOG_USEC=400000"]
    command += [str(PROGRAMS / "edge-agent"), "serve", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


def connect(port: int, deadline_s: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline_s, "nobody listens"
            time.sleep(0.02)


def test_the_server_takes_the_sockets_answers_and_notifies(tmp_path: Path) -> None:
    notify = tmp_path / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.socket() as probe:
        manager.bind(str(notify))
        manager.settimeout(30)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        with activated(tmp_path, port, notify):
            # The request is sent before the server exists: it waits in the held socket.
            with connect(port, time.monotonic() + 10) as client:
                client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert client.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
            said = [manager.recv(4096).decode() for _ in range(4)]
        assert said[0] == "READY=1"
        assert said[1:] == ["WATCHDOG=1"] * 3
        while (last := manager.recv(4096).decode()) == "WATCHDOG=1":
            pass
        assert last == "STOPPING=1"
    assert (tmp_path / "run/c.sock").is_socket(), "sockets that systemd holds are not the server's to remove"
