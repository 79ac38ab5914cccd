"""The slow look at stored versions: quick at the start, complete from time to time, a thread of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import verified
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.serving import adapt
from edge_agent.update import recheck
from edge_agent.update.recheck import Found, Recheck
from edge_contract.errors import StorageFault
from tests.support.models import install, make_bundle
from tests.support.waiting import wait_for

YEAR_MS = 365 * 86_400_000


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(Config(tenant="t", device="d", state_dir=str(tmp_path / "state")))


@pytest.fixture
def digest(tmp_path: Path, layout: Layout) -> str:
    bundle = make_bundle(tmp_path, padding_bytes=3 << 20)
    install(bundle, layout)
    return bundle.digest


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recheck, "_LOOK_AT_MOST_EVERY_S", 0.0)
    monkeypatch.setattr(recheck, "_RATE_BYTES_PER_S", 1 << 40)


@pytest.fixture
def looker(layout: Layout) -> Iterator[Recheck]:
    looker = Recheck(layout, recheck_s=3600.0)
    yield looker
    looker.stop()
    ended(looker)


def ended(looker: Recheck) -> None:
    thread = looker._thread
    if thread is not None:
        thread.join(10)


def look(looker: Recheck, digest: str, now_ms: int) -> list[Found]:
    """One whole look and what it found."""
    looker.poll([digest], now_ms)
    ended(looker)
    looker._next_s = float("inf")
    found = looker.poll([digest], now_ms)
    looker._next_s = 0.0
    return found


def flip(path: Path) -> None:
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_first_look_believes_the_record_and_a_later_one_reads_all(
    layout: Layout, looker: Recheck, digest: str
) -> None:
    verified.remember(layout, digest, 1000)
    flip(layout.version(digest) / "model.onnx")
    assert look(looker, digest, 2000) == []
    assert look(looker, digest, 2000) == []  # not due yet
    (found,) = look(looker, digest, 3_700_000)
    assert (found.digest, found.damaged) == (digest, True)
    assert "model.onnx" in found.detail


def test_the_first_look_finds_what_shows(layout: Layout, looker: Recheck, digest: str) -> None:
    verified.remember(layout, digest, 1000)
    (layout.version(digest) / "model.onnx").unlink()
    (found,) = look(looker, digest, 2000)
    assert found.damaged


@pytest.mark.parametrize("now_ms", [1, 56 * YEAR_MS])
def test_a_clock_that_was_set_means_now(layout: Layout, looker: Recheck, digest: str, now_ms: int) -> None:
    look(looker, digest, 5000)  # the quick one
    verified.remember(layout, digest, 5000)
    assert look(looker, digest, now_ms) == []
    known = verified.record(layout, digest)
    assert known is not None
    assert known.hashed_ms == now_ms


def test_a_disk_that_does_not_answer_is_told_apart(
    layout: Layout, looker: Recheck, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, count: int) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", refuse)
        (found,) = look(looker, digest, 1000)
    assert (found.damaged, "Input/output error" in found.detail) == (False, True)


def test_a_refused_priority_keeps_nobody_from_looking(
    layout: Layout, looker: Recheck, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filter of the shipped unit refuses it."""

    def refuse(which: int, who: int, priority: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", refuse)
    (layout.version(digest) / "model.onnx").unlink()
    (found,) = look(looker, digest, 2000)
    assert found.damaged


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_look_that_dies_is_told_once_and_the_next_one_comes(
    layout: Layout, looker: Recheck, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(verified, "check", die)
        with pytest.raises(StorageFault, match="before it was through"):
            look(looker, digest, 2000)
    looker._next_s = 0.0
    (layout.version(digest) / "model.onnx").unlink()
    (found,) = look(looker, digest, 10**10)
    assert found.damaged


@pytest.fixture
def form(tmp_path: Path, layout: Layout) -> Path:
    """The weights of a prepared form whose version was read a while ago."""
    bundle = make_bundle(tmp_path, "formed", features=64, classes=32)
    install(bundle, layout)
    assert adapt.run(layout.version(bundle.digest), layout.prepared, 1 << 30).made
    verified.remember(layout, bundle.digest, 1000)
    (weights,) = layout.prepared.glob("*/*/weights.bin")
    return weights


@pytest.mark.parametrize("damage", ["none", "flip", "record", "no record"])
def test_a_form_that_decays_unseen_is_found_and_named(
    layout: Layout, looker: Recheck, form: Path, damage: str
) -> None:
    digest, record = form.parents[1].name, form.with_name("prepared.json")
    {
        "none": lambda: None,
        "flip": lambda: flip(form),
        "record": lambda: record.write_bytes(b"{"),
        "no record": record.unlink,
    }[damage]()
    (form.parents[1] / ".new-building.tmp").mkdir()
    look(looker, digest, 2000)  # the quick one
    found = look(looker, digest, 3_700_000)
    known = verified.record(layout, digest)
    assert known is not None
    assert known.hashed_ms == 3_700_000  # the version itself is well
    if damage == "none":
        assert found == []
    else:
        assert [(f.digest, f.damaged, f.form) for f in found] == [(digest, True, True)]
        assert "prepared form" in found[0].detail


def test_it_takes_its_time_and_is_stopped_at_once(
    layout: Layout, looker: Recheck, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recheck, "_RATE_BYTES_PER_S", 1 << 10)
    look(looker, digest, 1000)
    looker.poll([digest], 10**10)
    thread = looker._thread
    assert thread is not None
    assert looker.poll([digest], 10**10) == []  # one at a time
    assert thread is looker._thread
    assert thread.is_alive()
    looker.stop()
    wait_for(lambda: not thread.is_alive(), "its end", timeout_s=5)
