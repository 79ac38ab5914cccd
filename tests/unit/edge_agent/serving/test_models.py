"""The model set: which version gets a request, when an old one is let go, what is done at start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from edge_agent import files
from edge_agent.config import Config, Serving
from edge_agent.layout import Layout
from edge_agent.serving import adapt, opener
from edge_agent.serving.models import ModelSet
from edge_agent.serving.starts import Starts
from edge_contract.errors import BundleRejected, Reason, RequestRejected, StorageFault
from tests.support.models import BundleOnDisk, install, make_bundle, point, samples

Check = Callable[[ModelSet], Coroutine[Any, Any, None]]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(Config("acme", "box-1", state_dir=str(tmp_path / "state"), run_dir=str(tmp_path / "run")))


def run(layout: Layout, check: Check, *, started: bool = True, **serving: Any) -> None:
    async def whole() -> None:
        models = ModelSet(layout, Serving(**serving))
        if started:
            await models.start()
        try:
            await check(models)
        finally:
            models.close()

    asyncio.run(asyncio.wait_for(whole(), 20))


def two(tmp_path: Path, layout: Layout) -> tuple[BundleOnDisk, BundleOnDisk]:
    """Versions 1 (current) and 2 (in the store)."""
    first = make_bundle(tmp_path, version="1", seed=1)
    second = make_bundle(tmp_path, version="2", release=2, seed=2)
    install(first, layout)
    install(second, layout, link=None)
    return first, second


def test_an_empty_device_is_ready_and_serves_nothing(layout: Layout) -> None:
    async def check(models: ModelSet) -> None:
        assert models.ready()
        assert models.index() == []
        with pytest.raises(RequestRejected, match="there is none"):
            models.find("tiny", None)

    run(layout, check)


def test_what_the_disk_names_is_loaded_at_start(tmp_path: Path, layout: Layout) -> None:
    first, _ = two(tmp_path, layout)
    install(make_bundle(tmp_path, "other"), layout)
    (layout.models / ".tmp-leftover").mkdir()
    (layout.models / "no-link").mkdir()

    async def check(models: ModelSet) -> None:
        assert [e["name"] for e in models.index()] == ["other", "tiny"]
        assert models.find("tiny", None).digest == first.digest
        assert models.ready()
        assert list(layout.starts.iterdir()) == []

    run(layout, check)


def test_links_that_lead_nowhere_or_are_none_stop_nobody_else(tmp_path: Path, layout: Layout) -> None:
    install(make_bundle(tmp_path), layout)
    before = make_bundle(tmp_path, "dangling")
    install(before, layout, "previous")
    point(layout, "dangling", "current", "f" * 64)
    (layout.models / "plain").mkdir()
    (layout.models / "plain" / "current").write_text("no link")

    async def check(models: ModelSet) -> None:
        entries = {e["name"]: e for e in models.index()}
        assert set(entries) == {"tiny", "dangling"}
        assert entries["dangling"]["digest"] == before.digest
        assert entries["dangling"]["reason"] == "not_found"

    run(layout, check)


def test_a_load_moves_the_pointer_and_closes_the_old_version_after_its_last_request(
    tmp_path: Path, layout: Layout
) -> None:
    first, second = two(tmp_path, layout)

    async def check(models: ModelSet) -> None:
        old = models.pin("tiny", None)
        new = await models.load("tiny", second.digest)
        assert models.find("tiny", None) is new
        assert new.digest == second.digest
        await asyncio.sleep(0.05)
        assert old.model.run({"x": samples(1)})  # still there: a request holds it
        assert [(c.snapshot().version, serves) for c, serves in models.counters()] == [
            ("2", True),
            ("1", False),
        ]
        old.release()
        await until_closed(old)
        # The same load again does nothing.
        assert await models.load("tiny", second.digest) is new

    run(layout, check)
    assert first.digest != second.digest


async def until_closed(version: Any, **shape: int) -> None:
    while True:
        try:
            version.model.run({"x": samples(1, **shape)})
        except RequestRejected:
            return
        await asyncio.sleep(0.01)


def test_an_old_version_that_does_not_drain_is_let_go_in_time(
    tmp_path: Path, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    _, second = two(tmp_path, layout)

    async def check(models: ModelSet) -> None:
        old = models.pin("tiny", None)
        await models.load("tiny", second.digest)
        await until_closed(old)
        assert "still has requests after 0.1 s" in caplog.text

    run(layout, check, drain_timeout_s=0.1)


def test_a_load_that_fails_leaves_the_old_version_serving(tmp_path: Path, layout: Layout) -> None:
    first, _ = two(tmp_path, layout)
    broken = make_bundle(tmp_path, version="3", fault="garbage")
    install(broken, layout, link=None)

    async def check(models: ModelSet) -> None:
        with pytest.raises(BundleRejected) as refusal:
            await models.load("tiny", broken.digest)
        assert refusal.value.reason is Reason.LOAD_FAILED
        assert models.find("tiny", None).digest == first.digest
        assert models.index()[0]["state"] == "READY"
        assert models.ready()
        with pytest.raises(BundleRejected):
            await models.load("new", broken.digest)
        assert [e["name"] for e in models.index()] == ["tiny"]

    run(layout, check)


def test_a_load_without_a_digest_takes_what_the_disk_names(tmp_path: Path, layout: Layout) -> None:
    _, second = two(tmp_path, layout)

    async def check(models: ModelSet) -> None:
        point(layout, "tiny", "current", second.digest)
        assert (await models.load("tiny")).digest == second.digest
        with pytest.raises(RequestRejected, match="names no version of 'absent'"):
            await models.load("absent")

    run(layout, check)


def test_unload_and_load_again(tmp_path: Path, layout: Layout) -> None:
    first, _ = two(tmp_path, layout)

    async def check(models: ModelSet) -> None:
        version = models.find("tiny", None)
        await models.unload("tiny")
        await models.unload("tiny")
        assert models.index() == []
        with pytest.raises(RequestRejected):
            models.pin("tiny", None)
        await until_closed(version)
        await models.load("tiny", first.digest)
        assert models.find("tiny", "1").digest == first.digest

    run(layout, check)


def test_loads_at_the_same_time_leave_one_version(tmp_path: Path, layout: Layout) -> None:
    first, second = two(tmp_path, layout)

    async def check(models: ModelSet) -> None:
        digests = [first.digest, second.digest] * 4
        await asyncio.gather(*(models.load("tiny", d) for d in digests), models.unload("absent"))
        serving = models.find("tiny", None)
        assert serving.model.run({"x": samples(1)})
        assert len(models.index()) == 1

    run(layout, check)


def test_a_model_that_does_not_load_is_named_and_the_others_serve(tmp_path: Path, layout: Layout) -> None:
    broken = make_bundle(tmp_path, "broken", fault="garbage")
    install(broken, layout)
    install(make_bundle(tmp_path), layout)

    async def check(models: ModelSet) -> None:
        entry = models.index()[0]
        assert (entry["name"], entry["state"], entry["reason"]) == ("broken", "UNAVAILABLE", "load_failed")
        assert entry["digest"] == broken.digest
        assert "does not load" in entry["detail"]
        with pytest.raises(RequestRejected) as refusal:
            models.pin("broken", None)
        assert refusal.value.reason is Reason.MODEL_NOT_READY
        assert models.find("tiny", None)
        assert not models.ready()
        assert (
            Starts(layout.starts, layout.spare_starts).failed("broken", broken.digest) == 0
        )  # the process survived it

    run(layout, check)


def test_the_version_before_serves_when_the_current_one_does_not_load(tmp_path: Path, layout: Layout) -> None:
    good, broken = make_bundle(tmp_path, version="1"), make_bundle(tmp_path, version="2", fault="garbage")
    install(good, layout, "previous")
    install(broken, layout, "current")

    async def check(models: ModelSet) -> None:
        entry = models.index()[0]
        assert (entry["state"], entry["digest"], entry["reason"]) == ("READY", good.digest, "load_failed")
        # Told to serve what it serves, it has nothing more to explain.
        await models.load("tiny", good.digest)
        assert models.index()[0]["reason"] == ""

    run(layout, check)


@pytest.mark.parametrize(("failed", "serves"), [(2, "2"), (3, "1")])
def test_a_version_with_too_many_failed_starts_is_passed_over(
    tmp_path: Path, layout: Layout, failed: int, serves: str
) -> None:
    before, current = make_bundle(tmp_path, version="1"), make_bundle(tmp_path, version="2")
    install(before, layout, "previous")
    install(current, layout, "current")
    for _ in range(failed):
        Starts(layout.starts, layout.spare_starts).begin("tiny", current.digest)

    async def check(models: ModelSet) -> None:
        entry = models.index()[0]
        assert (entry["state"], entry["version"]) == ("READY", serves)
        assert entry["reason"] == ("failed_starts" if serves == "1" else "")
        left = Starts(layout.starts, layout.spare_starts).failed("tiny", current.digest)
        assert left == (failed if serves == "1" else 0)

    run(layout, check, max_failed_starts=3)


def test_when_both_versions_failed_to_start_neither_is_tried_before_the_others_serve(
    tmp_path: Path, layout: Layout
) -> None:
    for version, link in (("1", "previous"), ("2", "current")):
        bundle = make_bundle(tmp_path, version=version)
        install(bundle, layout, link)  # type: ignore[arg-type]
        Starts(layout.starts, layout.spare_starts).begin("tiny", bundle.digest)

    async def check(models: ModelSet) -> None:
        entry = models.index()[0]
        assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "failed_starts")
        # An operator who loads it by hand and sees it live has settled the matter.
        await models.load("tiny", bundle.digest)
        assert Starts(layout.starts, layout.spare_starts).failed("tiny", bundle.digest) == 0

    run(layout, check, max_failed_starts=1)


def test_a_start_that_is_cancelled_is_not_counted(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path, fault="slow")
    install(bundle, layout)

    async def check(models: ModelSet) -> None:
        task = asyncio.create_task(models.start())
        while not models.busy:
            await asyncio.sleep(0.001)
        assert Starts(layout.starts, layout.spare_starts).failed("tiny", bundle.digest) == 1
        task.cancel()
        await asyncio.wait((task,))
        assert Starts(layout.starts, layout.spare_starts).failed("tiny", bundle.digest) == 0

    run(layout, check, started=False)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried after milliseconds."""
    monkeypatch.setattr(opener, "_RETRY_S", 0.02)


async def until_it_serves(models: ModelSet, name: str = "tiny") -> dict[str, str]:
    while not all(e["state"] == "READY" for e in models.index() if e["name"] == name):
        await asyncio.sleep(0.01)
    (entry,) = (e for e in models.index() if e["name"] == name)
    return entry


@pytest.mark.usefixtures("soon")
def test_after_any_number_of_power_cuts_a_version_comes_back(tmp_path: Path, layout: Layout) -> None:
    """The current one first, although none was struck out less often."""
    counter = Starts(layout.starts, layout.spare_starts)
    for version, link in (("1", "previous"), ("2", "current")):
        bundle = make_bundle(tmp_path, version=version)
        install(bundle, layout, link)  # type: ignore[arg-type]
        for _ in range(4):
            counter.begin("tiny", bundle.digest)

    async def check(models: ModelSet) -> None:
        assert models.index()[0]["reason"] == "failed_starts"
        entry = await until_it_serves(models)
        assert (entry["version"], entry["reason"]) == ("2", "")
        assert counter.failed("tiny", bundle.digest) == 0

    run(layout, check)


@pytest.mark.usefixtures("soon")
def test_a_late_start_is_counted_as_well(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path)
    install(bundle, layout)
    counter = Starts(layout.starts, layout.spare_starts)
    for _ in range(3):
        counter.begin("tiny", bundle.digest)
    seen: list[int] = []
    real = opener.open_version

    def watch(*arguments: Any, **options: Any) -> Any:
        seen.append(counter.failed("tiny", bundle.digest))
        return real(*arguments, **options)

    monkeypatch.setattr(opener, "open_version", watch)

    async def check(models: ModelSet) -> None:
        await until_it_serves(models)
        assert seen == [4]

    run(layout, check)


def test_pauses_grow_with_every_try_and_every_start_that_was_not_survived(layout: Layout) -> None:
    counter = Starts(layout.starts, layout.spare_starts)
    here = opener.Opener(layout, Serving())
    assert [here.pause_s("m", ["a" * 64], tries) for tries in (0, 1, 2, 50)] == [2, 4, 8, 600]
    for _ in range(5):
        counter.begin("m", "a" * 64)
    assert here.pause_s("m", ["a" * 64], 0) == 8
    here.close()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("times", [1, 3])
def test_a_disk_that_does_not_answer_at_the_start_is_asked_again(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    install(make_bundle(tmp_path), layout)
    fault = StorageFault(Reason.STORAGE_FAULT, "model.onnx: Input/output error", "check the disk")
    failing = iter([fault] * times)
    real = opener.open_version

    def read(*arguments: Any, **options: Any) -> Any:
        for error in failing:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(opener, "open_version", read)

    async def check(models: ModelSet) -> None:
        assert models.index()[0]["detail"] == "model.onnx: Input/output error"
        assert (await until_it_serves(models))["reason"] == ""

    run(layout, check)


@pytest.mark.usefixtures("soon")
def test_a_link_that_cannot_be_read_is_told_and_read_again(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path)
    install(bundle, layout)
    broken = {layout.current("tiny")}
    real = files.link_target

    def link_target(link: Path) -> str | None:
        if link in broken:
            raise StorageFault(Reason.STORAGE_FAULT, f"{link}: Input/output error", "check the disk")
        return real(link)

    monkeypatch.setattr(files, "link_target", link_target)

    async def check(models: ModelSet) -> None:
        entry = models.index()[0]
        assert (entry["name"], entry["state"], entry["reason"]) == ("tiny", "UNAVAILABLE", "storage_fault")
        assert not models.ready()
        broken.clear()
        assert (await until_it_serves(models))["digest"] == bundle.digest

    run(layout, check)


def test_a_link_to_the_version_before_that_cannot_be_read_is_none(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(make_bundle(tmp_path), layout)
    real = files.link_target

    def link_target(link: Path) -> str | None:
        if link == layout.previous("tiny"):
            raise StorageFault(Reason.STORAGE_FAULT, f"{link}: Input/output error", "check the disk")
        return real(link)

    monkeypatch.setattr(files, "link_target", link_target)

    async def check(models: ModelSet) -> None:
        assert models.ready()

    run(layout, check)


@pytest.mark.usefixtures("soon")
def test_what_is_removed_is_not_tried_again(tmp_path: Path, layout: Layout) -> None:
    install(make_bundle(tmp_path, fault="garbage"), layout)

    async def check(models: ModelSet) -> None:
        await models.unload("tiny")
        await asyncio.wait(models._retries.values())
        assert models.index() == []

    run(layout, check)


@pytest.fixture
def formed(tmp_path: Path, layout: Layout) -> BundleOnDisk:
    """A version of which this device has a form of its own."""
    bundle = make_bundle(tmp_path, features=64, classes=32)
    install(bundle, layout)
    assert adapt.run(layout.version(bundle.digest), layout.prepared, 1 << 30).made
    return bundle


@pytest.mark.parametrize(("failed", "form"), [(0, "prepared"), (1, "original")])
def test_after_a_start_that_was_not_survived_the_original_is_tried(
    layout: Layout, formed: BundleOnDisk, failed: int, form: str
) -> None:
    for _ in range(failed):
        Starts(layout.starts, layout.spare_starts).begin("tiny", formed.digest)

    async def check(models: ModelSet) -> None:
        assert models.index()[0]["form"] == form

    run(layout, check)


def test_the_original_of_what_serves_is_loaded_on_demand(layout: Layout, formed: BundleOnDisk) -> None:
    async def check(models: ModelSet) -> None:
        prepared = models.find("tiny", None)
        assert await models.load("tiny", formed.digest) is prepared
        original = await models.load("tiny", formed.digest, original=True)
        assert models.index()[0]["form"] == "original"
        await until_closed(prepared, features=64)
        assert await models.load("tiny", formed.digest, original=True) is original

    run(layout, check)
