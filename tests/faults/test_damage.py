"""Files of a device that decay while it is off: found, repaired or refused, told, and never served."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import files, sealed
from edge_agent.update.floor import order_floor
from tests.faults.conftest import Cases
from tests.support.rig import FORM_BYTES, NAME, Rig, Shelf

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Version 3 serves, installed by the agent, 2 did before. Each test leaves it so."""
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    with Rig(shelf, recheck_s=0.3, prepared_max_bytes=FORM_BYTES) as rig:
        rig.want(3)
        _on(rig)
        rig.until(lambda: rig.settled, "the update")
        rig.assert_complete(3, 2)
        _off(rig)
        yield rig


@pytest.fixture(autouse=True)
def whole_afterwards(rig: Rig) -> Iterator[None]:
    yield
    _off(rig)


def _on(rig: Rig) -> None:
    rig.start("serve")
    rig.start("run")


def _off(rig: Rig) -> None:
    for command in ("run", "serve"):
        rig.end(command, signal.SIGTERM)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _flip(path: Path) -> None:
    """As a disk does it: nothing but the content tells."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


HOW = {"truncated": _truncate, "zero-filled": _zero, "bit-flipped": _flip}


def _version_file(rig: Rig, name: str, version: int = 3) -> Path:
    return rig.layout.version(rig.shelf.versions[version - 1].digest) / name


def _goes_on(rig: Rig) -> None:
    """The device is used: never a wrong answer, and in the end all is as it was."""
    _on(rig)
    rig.assert_answers_among(2, 3)
    rig.until(lambda: _is_well(rig), "the repair")
    rig.assert_answers_among(3)


def _is_well(rig: Rig) -> bool:
    rig.assert_answers_among(2, 3)
    versions = rig.shelf.versions
    names = (versions[2].digest, versions[1].digest)
    return rig.settled and rig.store.named(NAME) == names and all(map(rig.store.has, names))


FILES = ["model.onnx", "golden.npz", "padding.bin", "manifest.json"]
SAMPLE = {("model.onnx", "zero-filled"), ("manifest.json", "bit-flipped")}


@pytest.mark.parametrize(
    ("file", "how"),
    [
        pytest.param(file, how, marks=[] if (file, how) in SAMPLE else pytest.mark.thorough)
        for file in FILES
        for how in HOW
    ],
)
def test_a_file_of_the_version_that_serves(rig: Rig, cases: Cases, file: str, how: str) -> None:
    path, before = _version_file(rig, file), len(rig.device.log)
    cases.add(f"store: {file}", how)
    HOW[how](path)
    _goes_on(rig)
    rig.assert_complete(3, 2)
    assert "damaged" in rig.device.log[before:]


@pytest.mark.thorough
@pytest.mark.parametrize("file", ["model.onnx", "manifest.json"])
def test_a_file_while_the_registry_is_away(rig: Rig, cases: Cases, file: str) -> None:
    """The version before serves meanwhile."""
    cases.add(f"store: {file}, registry away", "truncated")
    _truncate(_version_file(rig, file))
    rig.server.stop()
    try:
        _on(rig)
        rig.until(lambda: rig.entry.state == "waiting", "the wait for the registry")
        rig.assert_answers_among(2)
        assert rig.entry.interruptions >= 1
    finally:
        rig.server.start()
    rig.until(lambda: _is_well(rig), "the repair")
    rig.until(lambda: rig.serving_seed() == 3, "the repaired version")


@pytest.mark.thorough
@pytest.mark.parametrize("how", HOW)
def test_a_file_of_the_prepared_form(rig: Rig, cases: Cases, how: str) -> None:
    forms = [
        p for p in rig.layout.prepared.rglob("*") if p.is_file() and rig.shelf.versions[2].digest in str(p)
    ]
    assert forms
    for path in forms:
        cases.add(f"prepared form: {path.name}", how)
        HOW[how](path)
        _on(rig)
        rig.assert_answers_among(3)
        _off(rig)


@pytest.mark.thorough
@pytest.mark.parametrize("how", HOW)
def test_the_record_of_what_was_verified(rig: Rig, cases: Cases, how: str) -> None:
    path = rig.layout.verified(rig.shelf.versions[2].digest)
    cases.add("verified record", how)
    HOW[how](path)
    before = path.read_bytes()
    _on(rig)
    rig.assert_answers_among(3)
    rig.until(lambda: path.read_bytes() != before, "a new record")


# what says which version serves


@pytest.mark.parametrize(
    "damage",
    [
        "gone",
        pytest.param("dangling", marks=pytest.mark.thorough),
        pytest.param("a file", marks=pytest.mark.thorough),
        pytest.param("foreign", marks=pytest.mark.thorough),
    ],
)
def test_the_link_to_what_serves(rig: Rig, cases: Cases, damage: str) -> None:
    link = rig.layout.current(NAME)
    cases.add("link current", damage)
    _damage_link(link, damage)
    _on(rig)
    rig.until(lambda: _links_are_well(rig), "the link")
    rig.until(lambda: rig.serves() and rig.serving_seed() == 3, "the version")


@pytest.mark.thorough
@pytest.mark.parametrize("damage", ["gone", "dangling", "a file"])
def test_the_link_to_the_version_before(rig: Rig, cases: Cases, damage: str) -> None:
    """What serves is not touched; a way back that leads nowhere is no way back, and the status says so."""
    link = rig.layout.previous(NAME)
    cases.add("link previous", damage)
    digest = files.link_target(link)
    _damage_link(link, damage)
    _on(rig)
    rig.until(lambda: "control process of" in rig.device.log, "the control process")
    rig.assert_answers_among(3)
    told = rig.told()
    assert told["current"] == "3.0.0"
    assert told["previous"] in (None, f"missing {'0' * 12}")
    _off(rig)
    _restore_previous(rig, str(digest))


def _damage_link(link: Path, damage: str) -> None:
    link.unlink()
    match damage:
        case "dangling":
            link.symlink_to(f"../../store/{'0' * 64}")
        case "a file":
            link.write_bytes(b"\0" * 40)
        case "foreign":
            link.symlink_to("/etc")


def _restore_previous(rig: Rig, digest: str) -> None:
    if digest not in files.names(rig.layout.store):  # nothing named it any more, so it was collected
        _off(rig)
        rig.want(2)
        _on(rig)
        rig.until(lambda: rig.settled, "version 2")
        _off(rig)
        rig.want(3)
        _on(rig)
        rig.until(lambda: rig.settled, "version 3")
        return
    files.swap_link(rig.layout.previous(NAME), f"../../store/{digest}")


def _links_are_well(rig: Rig) -> bool:
    return rig.settled and rig.store.named(NAME) == tuple(rig.shelf.versions[n - 1].digest for n in (3, 2))


# what says where the update is


@pytest.mark.parametrize(
    ("what", "how"),
    [
        pytest.param(
            what, how, marks=[] if (what, how) == ("journal", "bit-flipped") else pytest.mark.thorough
        )
        for what in ("journal", "desired", "rejected")
        for how in HOW
    ],
)
def test_a_small_file(rig: Rig, cases: Cases, what: str, how: str) -> None:
    """Set aside and told; what serves does not depend on it."""
    path = {
        "journal": rig.layout.journal_file(NAME),
        "desired": rig.layout.desired,
        "rejected": rig.layout.rejected,
    }[what]
    if what == "rejected":
        sealed.write(path, {"0" * 64: {"reason": "too_slow", "detail": "x", "at_ms": 1}})
    saved = path.read_bytes()
    cases.add(what, how)
    HOW[how](path)
    _on(rig)
    rig.until(lambda: list(path.parent.glob(f"{path.name}.damaged-*")), "the damaged file to be set aside")
    rig.until(lambda: f"{path.name}.damaged-" in rig.device.log, "the report")
    rig.assert_sound(3)
    assert order_floor(rig.layout).value.generation == rig.generation  # an older order is still refused
    _off(rig)
    path.write_bytes(saved)
    for aside in path.parent.glob(f"{path.name}.damaged-*"):
        aside.unlink()
