"""What holds for every test: no skip under CI, nothing left running, Hypothesis without a stopwatch."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings

CI = bool(os.environ.get("CI"))

# Test machines are shared and slow at times; a deadline would test the neighbours.
settings.register_profile("edgeward", deadline=None)
settings.load_profile("edgeward")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI a skipped test is a failed one: everything it could need is installed there."""
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself as a whole."""
    report = yield
    if CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped under CI: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fails when a process started by the tests outlives them, also one that lost its parent.

    Every process inherits a mark in its environment. Leftovers are named and killed.
    """
    mark = f"EDGEWARD_TEST_RUN={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    os.environ[name] = value
    yield
    del os.environ[name]
    left = [_kill(pid) for pid in _marked(mark.encode())]
    assert not left, f"left running by the tests: {left}"


def _marked(mark: bytes) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        # Gone meanwhile, a zombie, or another user's.
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0") and (folder / "exe").readlink():
                yield int(folder.name)


def _kill(pid: int) -> str:
    command = ""
    with suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        os.kill(pid, signal.SIGKILL)
    return f"{pid}: {command.strip()}"
