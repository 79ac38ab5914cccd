"""A floor survives whatever happens to one of its copies, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent import files
from edge_agent.update.floor import Floor
from edge_agent.update.levels import Level, MetadataFloor, OrderFloor, SignedTime, with_generation
from edge_contract.errors import Reason, StorageFault

VALUE = MetadataFloor(roles={"root": Level(3, []), "bin-7": Level(9, ["a"])}, time=SignedTime(1000, ["b"]))


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "one" / "m.floor", tmp_path / "two" / "m.floor"


def opened(paths: tuple[Path, Path]) -> Floor[MetadataFloor]:
    return Floor(paths, MetadataFloor())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "emptied": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit flipped": flip,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "something else": lambda path: path.write_bytes(b"{}"),
}


def test_a_new_device_has_no_floor_and_nothing_to_complain_about(paths: tuple[Path, Path]) -> None:
    floor = opened(paths)
    floor.repair()
    assert (floor.value, floor.problems) == (MetadataFloor(), [])
    assert not paths[0].exists()


def test_what_was_raised_is_there_after_a_restart(paths: tuple[Path, Path]) -> None:
    opened(paths).raise_to(VALUE)
    assert (opened(paths).value, opened(paths).problems) == (VALUE, [])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("copy", [0, 1])
def test_one_damaged_copy_loses_nothing_and_is_repaired(
    paths: tuple[Path, Path], copy: int, damage: str
) -> None:
    opened(paths).raise_to(VALUE)
    DAMAGES[damage](paths[copy])
    floor = opened(paths)
    assert floor.value == VALUE
    assert len(floor.problems) == 1
    assert str(paths[copy]) in floor.problems[0]
    floor.repair()
    assert (opened(paths).value, opened(paths).problems) == (VALUE, [])
    DAMAGES[damage](paths[1 - copy])
    assert opened(paths).value == VALUE


def test_a_cut_between_the_two_copies_leaves_the_newer(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(paths).raise_to(MetadataFloor(roles={"root": Level(2, [])}))
    write = files.write

    def cut(path: Path, data: bytes) -> None:
        if path == paths[1]:
            raise StorageFault(Reason.STORAGE_FAULT, "cut", "")
        write(path, data)

    monkeypatch.setattr(files, "write", cut)
    floor = opened(paths)
    with pytest.raises(StorageFault):
        floor.raise_to(VALUE)
    monkeypatch.undo()
    again = opened(paths)
    assert (again.value, again.problems) == (VALUE, [])
    again.repair()
    paths[0].unlink()
    assert opened(paths).value == VALUE


def test_nothing_is_written_when_nothing_rose(paths: tuple[Path, Path]) -> None:
    opened(paths).raise_to(VALUE)
    before = [path.stat().st_ino for path in paths]
    floor = opened(paths)
    floor.raise_to(VALUE)
    floor.repair()
    assert [path.stat().st_ino for path in paths] == before


def test_both_copies_damaged_are_told_and_the_device_goes_on(paths: tuple[Path, Path]) -> None:
    opened(paths).raise_to(VALUE)
    for path in paths:
        path.write_bytes(b"")
    floor = opened(paths)
    assert floor.value == MetadataFloor()
    assert len(floor.problems) == 2
    floor.repair()
    assert opened(paths).problems == []


def test_a_disk_that_does_not_read_is_a_fault_and_no_new_beginning(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(paths).raise_to(VALUE)
    read, broken = files.read, set(paths)

    def fails(path: Path) -> bytes | None:
        if path in broken:
            raise StorageFault(Reason.STORAGE_FAULT, f"{path}: input/output error", "")
        return read(path)

    monkeypatch.setattr(files, "read", fails)
    with pytest.raises(StorageFault):
        opened(paths)
    broken.remove(paths[1])
    floor = opened(paths)
    assert floor.value == VALUE
    assert str(paths[0]) in floor.problems[0]


def test_values_of_another_kind_are_refused(paths: tuple[Path, Path]) -> None:
    Floor(paths, OrderFloor()).raise_to(with_generation(OrderFloor(), 7))
    assert opened(paths).value == MetadataFloor()
    assert "generation" in opened(paths).problems[0]
    assert Floor(paths, OrderFloor()).value.generation == 7
