"""The whole process: swaps under load, crashes at start, held sockets, signals, the watchdog."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent import config as configuration
from edge_agent.layout import Layout
from edge_agent.serving.starts import Starts
from tests.support.models import (
    ABOVE,
    install,
    make_bundle,
    point,
    samples,
    scores,
)
from tests.support.serving import (
    Answer,
    Client,
    Serving,
    activated,
    binary_output,
    binary_request,
    serving,
    wait_until,
    write_config,
)

INFER = "/v2/models/tiny/infer"
INFER_SLOW = "/v2/models/slow/infer"


def layout_of(config: Path) -> Layout:
    return Layout(configuration.load(config))


def above(count: int = 1) -> np.ndarray:
    x = samples(count)
    x[0, 0] = ABOVE
    return x


def begin_slow(client: Client, model: str) -> None:
    body, headers = binary_request({"x": ("FP32", above())})
    client.begin(f"/v2/models/{model}/infer", body, headers)


# --- swaps ---


class Load:
    """Threads that ask without pause and keep what was not right."""

    def __init__(self, server: Serving, answers: dict[str, np.ndarray], threads: int = 4) -> None:
        self.wrong: list[str] = []
        self.served: dict[str, int] = dict.fromkeys(answers, 0)
        self._answers = answers
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(server.tcp,)) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def total(self) -> int:
        return sum(self.served.values())

    def _ask(self, address: str) -> None:
        with Client(address) as client:
            while not self._stop.is_set():
                try:
                    self._check(client.infer("tiny", samples(2)))
                except Exception as e:  # noqa: BLE001 - whatever fails, fails the test
                    self.wrong.append(repr(e))
                    return

    def _check(self, answer: Answer) -> None:
        if answer.status != 200:
            self.wrong.append(f"{answer.status} {answer.body!r}")
            return
        length = int(answer.headers["inference-header-content-length"])
        version = json.loads(answer.body[:length])["model_version"]
        if not np.allclose(binary_output(answer), self._answers[version], atol=1e-6):
            self.wrong.append(f"version {version} answered as another")
        with self._lock:
            self.served[version] += 1


def test_twenty_swaps_under_load_fail_no_request(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    bundles = [make_bundle(tmp_path, version=str(i), seed=i) for i in (1, 2)]
    for bundle in reversed(bundles):
        install(bundle, layout_of(config))
    answers = {str(i): scores(samples(2), seed=i) for i in (1, 2)}
    with serving(config) as server, Load(server, answers) as load:
        for swap in range(20):
            target = bundles[(swap + 1) % 2]
            before = load.total()
            assert server.load("tiny", target.digest).json["version"] == target.manifest.version
            wait_until(lambda before=before: load.total() > before + 20 or load.wrong, "requests go on")
    assert load.wrong == []
    assert min(load.served.values()) > 50


# --- starts that do not survive ---


def test_a_model_that_kills_the_process_at_load_is_passed_over_after_some_starts(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_failed_starts=2)
    layout = layout_of(config)
    good, deadly = (
        make_bundle(tmp_path, version="1"),
        make_bundle(tmp_path, version="2", fault="crash_at_load"),
    )
    install(good, layout, "previous")
    install(deadly, layout, "current")
    install(make_bundle(tmp_path, "other"), layout)
    for _ in range(2):
        with serving(config) as server:
            assert server.process.wait(30) == -signal.SIGFPE
    with serving(config) as server, server.client() as client:
        np.testing.assert_allclose(
            binary_output(client.infer("tiny", samples(1))), scores(samples(1)), atol=1e-6
        )
        assert client.infer("other", samples(1)).status == 200
        entry = server.index()["tiny"]
        assert (entry["state"], entry["version"], entry["reason"]) == ("READY", "1", "failed_starts")
        assert entry["digest"] == good.digest
        assert any("does not start" in line and "failed_starts" in line for line in server.log())
    # The control process makes the disk say so; the next start is an ordinary one.
    point(layout, "tiny", "current", good.digest)
    with serving(config) as server:
        server.wait_for_log("listening on")
        assert server.index()["tiny"]["reason"] == ""


def test_a_version_that_only_lost_its_power_comes_back_by_itself(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    layout = layout_of(config)
    install(make_bundle(tmp_path, "other"), layout)
    bundle = make_bundle(tmp_path)
    install(bundle, layout)
    for _ in range(3):  # each a start that was not seen through
        Starts(layout.starts, layout.spare_starts).begin("tiny", bundle.digest)
    with serving(config) as server, server.client() as client:
        assert client.infer("other", samples(1)).status == 200
        assert server.index()["tiny"]["reason"] == "failed_starts"
        wait_until(lambda: client.infer("tiny", samples(1)).status == 200, "an answer")
        assert server.index()["tiny"]["reason"] == ""
        assert list(layout.starts.iterdir()) == []


def test_a_version_that_ends_the_process_leaves_the_others_time_in_between(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_failed_starts=1)
    layout = layout_of(config)
    deadly = make_bundle(tmp_path, fault="crash_at_load")
    install(deadly, layout)
    install(make_bundle(tmp_path, "other"), layout)
    with serving(config) as server:
        assert server.process.wait(30) == -signal.SIGFPE
    with serving(config) as server, server.client() as client:
        assert client.infer("other", samples(1)).status == 200
        assert server.index()["tiny"]["reason"] == "failed_starts"
        assert server.process.wait(30) == -signal.SIGFPE
    assert Starts(layout.starts, layout.spare_starts).failed("tiny", deadly.digest) == 2


def test_told_to_stop_while_a_model_does_not_return_from_its_load(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    bundle = make_bundle(tmp_path, fault="hang")
    install(bundle, layout_of(config))
    with serving(config) as server:
        counter = layout_of(config).starts / "tiny.json"
        wait_until(counter.exists, "the load began")
        begun_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun_s < 5
        assert not counter.exists()


# --- held sockets ---


@pytest.fixture
def held(tmp_path: Path) -> Iterator[dict[str, socket.socket]]:
    """Listening sockets that outlive the process, as systemd holds them. Descriptors above 10."""
    run = tmp_path / "run"
    run.mkdir()
    found = {}
    for role, address in (("http", ("127.0.0.1", 0)), ("local", run / "l.sock"), ("control", run / "c.sock")):
        plain = socket.socket(socket.AF_INET if role == "http" else socket.AF_UNIX)
        plain.bind(address if role == "http" else str(address))
        plain.listen(128)
        descriptor = os.dup2(plain.fileno(), 100 + len(found))
        plain.close()
        found[role] = socket.socket(fileno=descriptor)
    yield found
    for each in found.values():
        each.close()


def test_requests_wait_in_held_sockets_while_the_process_is_away(
    tmp_path: Path, held: dict[str, socket.socket]
) -> None:
    config = write_config(tmp_path)
    install(make_bundle(tmp_path), layout_of(config))
    host, port = held["http"].getsockname()
    body, headers = binary_request({"x": ("FP32", samples(1))})
    with Client(f"{host}:{port}") as early:
        early.begin(INFER, body, headers)  # nobody is there yet
        first = Serving(config, activated(held))
        try:
            assert early.finish().status == 200
            first.process.kill()
            first.process.wait(10)
            begun_s = time.monotonic()
            with Client(Path(held["local"].getsockname())) as late:
                late.begin(INFER, body, headers)
                second = Serving(config, activated(held))
                try:
                    assert late.finish().status == 200
                    assert time.monotonic() - begun_s < 3
                    with Client(Path(held["control"].getsockname())) as controller:
                        assert controller.request("GET", "/edgeward/v1/stats").status == 200
                    assert second.stop() == 0
                finally:
                    second.kill()
        finally:
            first.kill()
    # They are the manager's: still there, and nothing else was bound.
    assert Path(held["local"].getsockname()).exists()
    assert not layout_of(config).control_socket.exists()


# --- the end ---


def test_sigterm_finishes_what_is_under_way(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    install(make_bundle(tmp_path, "slow", fault="slow_above"), layout_of(config))
    with serving(config) as server:
        clients = [server.client() for _ in range(4)]
        idle = server.client()
        assert idle.request("GET", "/v2").status == 200
        for client in clients:
            begin_slow(client, "slow")
        wait_until(lambda: "queue_running 2" in metrics(server), "two run, two wait")
        assert server.stop() == 0
        answers = [client.finish() for client in clients]
        assert [a.status for a in answers] == [200] * 4
        for client in (*clients, idle):
            client.close()
        assert list(server.layout.run.iterdir()) == []
        assert server.log()[-1].endswith("stopped")


def metrics(server: Serving) -> str:
    with server.client() as client:
        return client.request("GET", "/metrics").body.decode()


def test_sigterm_does_not_wait_for_a_run_that_hangs(tmp_path: Path) -> None:
    config = write_config(tmp_path, drain_timeout_s=1.0, request_timeout_s=0.5)
    install(make_bundle(tmp_path, fault="hang_above"), layout_of(config))
    with serving(config) as server, server.client() as client:
        answer = client.infer("tiny", above())
        assert (answer.status, answer.json["reason"]) == (504, "deadline_exceeded")
        assert client.infer("tiny", samples(1)).status == 200  # the other worker is free
        begun_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun_s < 5


def test_a_killed_process_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    install(make_bundle(tmp_path), layout_of(config))
    with serving(config) as server:
        server.wait_for_log("listening on")
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        assert server.control.exists()
        begun_s = time.monotonic()
        with serving(config) as again, again.client() as client:
            assert client.infer("tiny", samples(1)).status == 200
            assert time.monotonic() - begun_s < 3
            # A second one beside it is refused, and harms nothing.
            with serving(config) as third:
                assert third.process.wait(30) == 7
                assert "in use by another process" in third.log()[-1]
            assert client.infer("tiny", samples(1)).status == 200


def test_a_request_that_kills_the_process_kills_only_this_process(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    install(make_bundle(tmp_path, fault="crash_above"), layout_of(config))
    with serving(config) as server, server.client() as client:
        assert client.infer("tiny", samples(1)).status == 200
        with pytest.raises((ConnectionError, EOFError)):
            client.infer("tiny", above())
        assert server.process.wait(10) == -signal.SIGFPE
    # It did load: no start is held against it.
    assert list(server.layout.starts.iterdir()) == []


# --- the service manager ---


class Manager:
    """What a service manager receives."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.received: list[str] = []
        self.path = path

    def look(self) -> list[str]:
        while True:
            try:
                self.received.append(self._socket.recv(200).decode())
            except BlockingIOError:
                return self.received

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


def start_watched(config: Path, manager: Manager, watchdog_s: float) -> Serving:
    def popen(command: list[str], log: Any) -> Any:
        import subprocess

        environ = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": str(int(watchdog_s * 1e6))}
        return subprocess.Popen(command, stderr=log, env={**os.environ, **environ})

    return Serving(config, popen)


def test_the_manager_hears_ready_pings_and_stopping(tmp_path: Path, manager: Manager) -> None:
    config = write_config(tmp_path)
    install(make_bundle(tmp_path), layout_of(config))
    server = start_watched(config, manager, 0.2)
    try:
        wait_until(lambda: "READY=1" in manager.look(), "ready")
        with Client(server.local) as client:
            assert client.infer("tiny", samples(1)).status == 200
        wait_until(lambda: manager.look().count("WATCHDOG=1") >= 4, "pings")
        os.kill(server.pid, signal.SIGSTOP)  # a loop that does not turn does not ping
        time.sleep(0.05)
        seen = manager.look().count("WATCHDOG=1")
        time.sleep(0.4)
        assert manager.look().count("WATCHDOG=1") == seen
        os.kill(server.pid, signal.SIGCONT)
        assert server.stop() == 0
        assert "STOPPING=1" in manager.look()
    finally:
        server.kill()


def test_a_process_whose_workers_all_hang_ends_to_be_restarted(tmp_path: Path, manager: Manager) -> None:
    config = write_config(tmp_path, workers=1, request_timeout_s=0.2)
    install(make_bundle(tmp_path, fault="hang_above"), layout_of(config))
    server = start_watched(config, manager, 0.4)
    try:
        with server.client() as client:
            assert client.infer("tiny", above()).status == 504
        assert server.process.wait(10) == 70
        assert "every worker has been in one run" in server.log()[-1]
    finally:
        server.kill()


def test_configurations_that_cannot_work_end_in_one_line(tmp_path: Path) -> None:
    config = write_config(tmp_path, tcp="203.0.113.7:80")
    with serving(config) as server:
        assert server.process.wait(30) == 2
        (line,) = server.log()
    assert "serving.tcp: cannot listen on 203.0.113.7:80" in line


def test_it_starts_and_answers_within_a_second_and_stays_small(tmp_path: Path) -> None:
    """Bounds with room for a busy machine; benchmarks/serving_footprint.py measures."""
    config = write_config(tmp_path)
    install(make_bundle(tmp_path), layout_of(config))
    best_s = 99.0
    for _ in range(3):
        begun_s = time.monotonic()
        with serving(config) as server, server.client() as client:
            assert client.infer("tiny", samples(1)).status == 200
            best_s = min(best_s, time.monotonic() - begun_s)
            status = Path(f"/proc/{server.pid}/status").read_text()
            resident_kb = next(int(t.split()[1]) for t in status.splitlines() if t.startswith("VmRSS"))
    assert best_s < 1.5
    assert resident_kb < 90 << 10
