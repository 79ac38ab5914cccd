"""Children of the control process: followed, bounded in time and memory, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_agent.update import children
from edge_agent.update.children import Child, Ended
from edge_agent.update.leash import Limits
from edge_contract.errors import Reason, StorageFault
from tests.support.waiting import wait_for

# Stands in for the subcommands: a module that `leash` runs instead of `edge_agent`.
_FAKE = """
import json, os, resource, signal, sys, time
def say(**line):
    print(json.dumps(line), flush=True)
match sys.argv[1]:
    case "talk":
        print("some library talks")
        say(event="one"); print('"a string is no line"'); say(event="two", n=2)
    case "refuse":
        say(event="resolved")
        say(event="error", reason="digest_mismatch", what="it is wrong", next_step="do it right")
        sys.exit(4)
    case "verdict":
        say(ok=False, error={"reason": "golden_mismatch", "what": "answers", "next_step": ""})
        sys.exit(4)
    case "crash":
        print("terrible things", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGFPE)
    case "exit":
        print("Traceback\\n  lines", file=sys.stderr)
        sys.exit(9)
    case "hang":
        say(event="resolved")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    case "eat":
        data = bytearray(int(sys.argv[2]))
        say(event="full", size=len(data))
    case "limits":
        limit = resource.getrlimit
        say(data=limit(resource.RLIMIT_DATA)[0], core=limit(resource.RLIMIT_CORE)[0],
            files=limit(resource.RLIMIT_NOFILE)[0], size=limit(resource.RLIMIT_FSIZE)[0],
            score=int(open("/proc/self/oom_score_adj").read()))
    case "burn":
        while True:
            pass
    case "write":
        with open(sys.argv[2], "wb") as file:
            file.write(b"x" * int(sys.argv[3]))
    case "escape":
        import ctypes, socket, subprocess
        tried = {
            "tcp": lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2]))),
            "udp": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
            "unix": lambda: socket.socket(socket.AF_UNIX),
            "exec": lambda: os.execv("/bin/true", ["true"]),
            "run": lambda: subprocess.run(["/bin/true"]),
        }
        for name, attempt in tried.items():
            try:
                attempt()
                say(tried=name, refused=False)
            except PermissionError:
                say(tried=name, refused=True)
        say(event="end")
    case "flood":
        sys.stderr.write("e" * 1_000_000); sys.stderr.flush()
        for i in range(20_000):
            say(event="progress", done_bytes=i)
"""


@pytest.fixture(autouse=True)
def fake_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fake"
    (folder / "edge_agent" / "update").mkdir(parents=True)
    (folder / "edge_agent" / "__init__.py").touch()
    (folder / "edge_agent" / "__main__.py").write_text(_FAKE)
    (folder / "edge_agent" / "update" / "__init__.py").touch()
    real = Path(children.__file__).parent.parent
    for part in ("update/leash.py", "update/confine.py", "signals.py"):
        (folder / "edge_agent" / part).write_text((real / part).read_text())
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.chdir(folder)


def run(*arguments: str, timeout_s: float = 20.0, **limits: Any) -> tuple[Ended, Child]:
    child = Child(list(arguments), timeout_s=timeout_s, limits=Limits(**limits))
    return wait_for(child.ended, "the child's end"), child


def test_lines_arrive_in_order_and_noise_does_not() -> None:
    ended, child = run("talk")
    assert child.lines() == [{"event": "one"}, {"event": "two", "n": 2}]
    assert child.lines() == []
    assert ended == Ended(0, {"event": "two", "n": 2}, False, "")


def test_a_refusal_carries_its_reason() -> None:
    ended, _ = run("refuse")
    assert ended.code == 4
    assert ended.failure() == (Reason.DIGEST_MISMATCH, "it is wrong → do it right")
    ended, _ = run("verdict")
    assert ended.failure() == (Reason.GOLDEN_MISMATCH, "answers")


def test_a_crash_is_a_result() -> None:
    ended, _ = run("crash")
    assert (ended.code, ended.hung) == (-signal.SIGFPE, False)
    assert ended.failure() == (
        Reason.CANDIDATE_CRASHED,
        "the child was killed by SIGFPE. terrible things",
    )
    ended, _ = run("exit")
    assert ended.failure() == (Reason.CANDIDATE_CRASHED, "the child ended with code 9. Traceback lines")


def test_a_child_that_hangs_is_killed_at_its_deadline() -> None:
    begun_s = time.monotonic()
    ended, _ = run("hang", timeout_s=0.5)
    assert 0.4 < time.monotonic() - begun_s < 5.0
    assert ended.hung
    assert ended.failure()[0] is Reason.CANDIDATE_HUNG


def test_a_memory_bomb_hits_its_limit_and_nobody_else() -> None:
    ended, _ = run("eat", str(1 << 30), memory_bytes=256 << 20)
    assert ended.code != 0
    assert ended.failure()[0] is Reason.CANDIDATE_CRASHED
    assert "MemoryError" in ended.stderr
    ended, _ = run("eat", str(64 << 20), memory_bytes=256 << 20)
    assert ended.last["size"] == 64 << 20


def test_limits_hold_from_the_start() -> None:
    ended, _ = run("limits", memory_bytes=300 << 20, open_files=100, file_bytes=5000, expendable=True)
    assert ended.last == {"data": 300 << 20, "core": 0, "files": 100, "size": 5000, "score": 1000}
    ended, _ = run("limits")
    assert (ended.last["data"], ended.last["core"], ended.last["size"]) == (-1, 0, -1)
    assert ended.last["score"] < 1000


def test_a_child_that_burns_cpu_is_ended_by_the_kernel() -> None:
    ended, _ = run("burn", cpu_s=1)
    assert ended.code == -signal.SIGXCPU


def test_a_file_cannot_grow_beyond_its_bound(tmp_path: Path) -> None:
    ended, _ = run("write", str(tmp_path / "file"), "2000", file_bytes=1000)
    assert ended.code == 1
    assert "File too large" in ended.stderr
    assert (tmp_path / "file").stat().st_size <= 1000


def test_a_confined_child_has_no_socket_and_starts_no_program() -> None:
    """A listener is there, so that only the filter can be what refuses."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        _, child = run("escape", port, confined=True)
        found = {line["tried"]: line["refused"] for line in child.lines() if "tried" in line}
        assert found == dict.fromkeys(("tcp", "udp", "unix", "exec", "run"), True)
        _, child = run("escape", port)
        assert {"tried": "tcp", "refused": False} in child.lines()


def test_a_child_that_talks_too_much_blocks_nobody() -> None:
    ended, child = run("flood")
    assert ended.last == {"event": "progress", "done_bytes": 19_999}
    assert len(child.lines()) == 20_000
    assert len(ended.stderr) <= 400


def test_kill_ends_and_reaps_it() -> None:
    child = Child(["hang"], timeout_s=60)
    wait_for(child.lines, "its first line")
    child.kill()
    ended = wait_for(child.ended, "its end")
    assert ended.code == -signal.SIGKILL
    assert not ended.hung


_PARENT = """
import sys, time
from edge_agent_real.update.children import Child
child = Child(["hang"], timeout_s=600)
while not child.lines(): time.sleep(0.01)
print(child._process.pid, flush=True)
time.sleep(600)
"""


def test_a_child_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    """A hanging candidate must not burn a core for ever after the control process was killed."""
    (tmp_path / "edge_agent_real").symlink_to(Path(children.__file__).parent.parent)
    root = Path(children.__file__).parent.parent.parent
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}:{root}"}
    command = [sys.executable, "-c", _PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    wait_for(lambda: not _runs(pid), "the child's end", timeout_s=5.0)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_process_can_be_made_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StorageFault, match="/nowhere/python"):
        Child(["talk"], timeout_s=1)


@pytest.mark.parametrize(
    ("code", "last", "reason"),
    [
        (5, {"reason": "of_a_newer_agent", "what": "no"}, Reason.REGISTRY_UNREACHABLE),
        (6, {"reason": "of_a_newer_agent", "what": "no"}, Reason.DEVICE_UNFIT),
        (1, {"error": 5}, Reason.CANDIDATE_CRASHED),
        (4, {"reason": None, "what": "no"}, Reason.LOAD_FAILED),
        (-40, {}, Reason.CANDIDATE_CRASHED),
    ],
)
def test_whatever_a_child_says_last_is_a_result(code: int, last: dict[str, object], reason: Reason) -> None:
    assert Ended(code, last, False, "").failure()[0] is reason
