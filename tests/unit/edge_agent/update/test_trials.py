"""Preflight's child as the updater runs it, real: what it is refused without, and what it leaves behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_agent.config import Config, Update
from edge_agent.inference import Loaded
from edge_agent.layout import Layout
from edge_agent.update import trials
from edge_agent.update.changes import Step
from edge_agent.update.children import Child
from edge_agent.update.journal import Entry, Permissions, Ref
from edge_agent.update.machine import Event, State
from edge_agent.update.remake import Remake
from edge_agent.update.store import Store
from edge_agent.update.trials import PreflightJob
from edge_contract.errors import Reason, StorageFault
from tests.support.models import BundleOnDisk, Fault, install, make_bundle
from tests.support.waiting import wait_for

CONFIG = Update(preflight_latency_factor=1000.0, disk_reserve_bytes=0, preflight_free_bytes=0)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(Config("acme", "box-1", state_dir=str(tmp_path / "state"), run_dir=str(tmp_path / "run")))


@pytest.fixture
def store(layout: Layout) -> Store:
    for folder in (layout.store, layout.models):
        folder.mkdir(parents=True)
    return Store(layout)


Start = Callable[..., PreflightJob]


@pytest.fixture
def start(layout: Layout, store: Store) -> Iterator[Start]:
    jobs: list[PreflightJob] = []

    def run(target: BundleOnDisk, base: BundleOnDisk | None = None, **options: object) -> PreflightJob:
        permissions = options.pop("permissions", Permissions())
        entry = Entry(
            schema=1,
            name="tiny",
            state=State.PREFLIGHT,
            target=Ref(target.manifest.version, target.digest),
            base=Ref(base.manifest.version, base.digest) if base else None,
            permissions=permissions,  # type: ignore[arg-type]
        )
        jobs.append(PreflightJob(entry, layout, store, replace(CONFIG, **options)))
        return jobs[-1]

    yield run
    for job in jobs:
        job.cancel()


def bundle(
    folder: Path, layout: Layout, version: int = 1, fault: Fault = "none", **options: int
) -> BundleOnDisk:
    made = make_bundle(folder, version=f"{version}.0.0", release=version, fault=fault, **options)
    install(made, layout)
    return made


def outcome(job: PreflightJob) -> Step:
    (step,) = wait_for(lambda: job.poll(0), "an outcome")
    return step


def test_a_good_version_passes_and_leaves_its_form(tmp_path: Path, layout: Layout, start: Start) -> None:
    good = bundle(tmp_path, layout)
    assert outcome(start(good)) == Step(Event.PASSED)
    (form,) = (layout.prepared / good.digest).iterdir()
    assert (form / "prepared.json").is_file()


def test_a_form_that_is_not_wanted_or_has_no_room_is_not_made(
    tmp_path: Path, layout: Layout, start: Start
) -> None:
    good = bundle(tmp_path, layout)
    for options in ({"prepared_max_bytes": 0}, {"prepared_max_bytes": 100}, {"disk_reserve_bytes": 1 << 60}):
        assert outcome(start(good, **options)) == Step(Event.PASSED)
        folder = layout.prepared / good.digest
        assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.parametrize("fails", ["preflight_child", "preflight_limits"])
def test_a_killed_child_that_cannot_be_started_again_interrupts(
    tmp_path: Path, layout: Layout, start: Start, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The kernel ends children when memory runs out, and then there may be none for a new one either."""
    job = start(bundle(tmp_path, layout))
    assert job._child is not None

    def no_memory(*_: object) -> None:
        raise StorageFault(Reason.STORAGE_FAULT, "no process can be made: ENOMEM", "free memory")

    monkeypatch.setattr(trials, fails, no_memory)
    os.kill(job._child._process.pid, signal.SIGKILL)
    step = outcome(job)
    assert (step.event, step.reason) == (Event.INTERRUPTED, Reason.STORAGE_FAULT)
    assert "ENOMEM" in step.detail


def test_a_kernel_that_cannot_confine_is_told_with_the_verdict(
    tmp_path: Path, layout: Layout, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = bundle(tmp_path, layout)
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import platform\nplatform.machine = lambda: 'vax'\n")
    monkeypatch.setenv("PYTHONPATH", f"{other}:{Path.cwd()}")
    step = outcome(start(good))
    assert step.event is Event.PASSED
    assert step.detail == "it was tried with the network of the agent: no filter is known for vax"


def test_a_child_that_dies_after_its_verdict_has_passed(
    tmp_path: Path, layout: Layout, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making the form may fail as it likes: it is this device's, not the bundle's."""
    good = bundle(tmp_path, layout)
    job = start(good)
    child = job._child
    assert child is not None
    heard: list[dict[str, object]] = []
    lines = child.lines
    monkeypatch.setattr(child, "lines", lambda: heard.extend(found := lines()) or found)
    wait_for(lambda: job.poll(0) or any("ok" in line for line in heard), "the verdict")
    if job._child is not None:
        child.kill()
        assert outcome(job) == Step(Event.PASSED)


def test_a_child_that_somebody_kills_is_started_again_but_not_for_ever(
    tmp_path: Path, layout: Layout, start: Start
) -> None:
    job = start(bundle(tmp_path, layout, fault="hang"))
    for _ in range(trials._MOST_STARTS):
        child = job._child
        assert child is not None
        os.kill(child._process.pid, signal.SIGKILL)
        steps = wait_for(lambda child=child: job.poll(0) or job._child is not child, "its end")
    assert isinstance(steps, list)
    assert (steps[0].event, steps[0].reason) == (Event.REJECTED, Reason.CANDIDATE_CRASHED)
    assert "killed 3 times" in steps[0].detail


def test_cpu_time_is_bounded_too(
    tmp_path: Path, layout: Layout, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = trials.preflight_limits
    monkeypatch.setattr(trials, "preflight_limits", lambda *args: limits(*args)._replace(cpu_s=2))
    step = outcome(start(bundle(tmp_path, layout, fault="hang")))
    assert (step.event, step.reason) == (Event.REJECTED, Reason.CANDIDATE_HUNG)
    assert "2 s of CPU time" in step.detail


def test_another_interface_is_refused_without_a_child(tmp_path: Path, layout: Layout, start: Start) -> None:
    base, other = bundle(tmp_path, layout), bundle(tmp_path, layout, 2, classes=5)
    job = start(other, base)
    assert job._child is None
    (step,) = job.poll(0)
    assert (step.event, step.reason) == (Event.UNFIT, Reason.INTERFACE_CHANGED)
    assert "scores FP32 [-1, 4] is now scores FP32 [-1, 5]" in step.detail
    assert outcome(start(other, base, permissions=Permissions(interface_change=True))) == Step(Event.PASSED)


def test_a_device_without_memory_is_not_the_bundles_fault(
    tmp_path: Path, layout: Layout, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Little:
        available = 10 << 20

    good = bundle(tmp_path, layout)
    monkeypatch.setattr(trials.psutil, "virtual_memory", Little)
    (step,) = start(good).poll(0)
    assert (step.event, step.reason) == (Event.UNFIT, Reason.MEMORY_TOO_SMALL)
    monkeypatch.undo()
    step = outcome(start(good, preflight_free_bytes=1 << 60))
    assert (step.event, step.reason) == (Event.UNFIT, Reason.MEMORY_TOO_SMALL)


# forms that are made again


def loaded(of: BundleOnDisk, form: str = "original") -> Loaded:
    return Loaded("tiny", of.manifest.version, of.digest, True, Reason.OK, form)


def follow(remake: Remake) -> None:
    remake.tick(idle=True)
    wait_for(lambda: (remake.tick(idle=True), remake._child is None)[1], "the end of the child")


def test_a_form_that_is_missing_is_made_again_once(tmp_path: Path, layout: Layout, store: Store) -> None:
    good = bundle(tmp_path, layout)
    remake = Remake(layout, store, CONFIG)
    remake.notice([loaded(good, "prepared")])
    follow(remake)
    assert not (layout.prepared / good.digest).exists()
    remake.notice([loaded(good)])
    follow(remake)
    (form,) = (layout.prepared / good.digest).iterdir()
    (form / "prepared.json").unlink()
    remake.notice([loaded(good)])  # tried already
    remake.tick(idle=True)
    assert remake._child is None


def test_it_waits_for_updates_and_gives_way_to_them(tmp_path: Path, layout: Layout, store: Store) -> None:
    good = bundle(tmp_path, layout)
    remake = Remake(layout, store, CONFIG)
    remake.notice([loaded(good)])
    remake.tick(idle=False)
    assert remake._child is None
    remake.tick(idle=True)
    assert isinstance(remake._child, Child)
    remake.tick(idle=False)
    assert remake._child is None
    assert not list((layout.prepared / good.digest).glob("[!.]*"))


def test_what_cannot_have_a_form_is_left_alone(tmp_path: Path, layout: Layout, store: Store) -> None:
    good = bundle(tmp_path, layout)
    for remake, entry in (
        (Remake(layout, store, replace(CONFIG, prepared_max_bytes=0)), loaded(good)),
        (Remake(layout, store, CONFIG), loaded(good)._replace(digest="a" * 64)),
        (Remake(layout, store, CONFIG), loaded(good)._replace(ready=False)),
    ):
        remake.notice([entry])
        remake.tick(idle=True)
        assert remake._child is None
