"""Small state files: any damage is found, and a file of an earlier agent is still read."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent import files, sealed
from edge_contract import canonical
from edge_contract.errors import Reason, StorageFault

VALUE = {"generation": 4, "name": "tiny"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    sealed.write(tmp_path / "f.json", VALUE)
    return tmp_path / "f.json"


def test_a_value_comes_back(path: Path, tmp_path: Path) -> None:
    assert sealed.read(path, dict) == VALUE
    assert sealed.read_or_set_aside(path, dict, 7) == VALUE
    assert sealed.read(tmp_path / "missing", dict) is None


def test_a_file_of_an_earlier_agent_has_no_seal(path: Path) -> None:
    path.write_bytes(canonical.to_bytes(VALUE))
    assert sealed.read(path, dict) == VALUE


def test_every_flipped_bit_is_found(path: Path) -> None:
    """Many of them leave JSON that says something else."""
    data = path.read_bytes()
    for at in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(canonical.DecodeFault):
            sealed.read(path, dict)


def test_every_cut_is_found_or_loses_nothing(path: Path) -> None:
    data = path.read_bytes()
    whole = data.index(b"\n")
    for length in range(len(data)):
        path.write_bytes(data[:length])
        if length == whole:  # only the seal is gone
            assert sealed.read(path, dict) == VALUE
        else:
            with pytest.raises(canonical.DecodeFault):
                sealed.read(path, dict)


def test_a_damaged_file_is_set_aside_under_a_name_of_its_own(path: Path) -> None:
    for name in ("f.json.damaged-7", "f.json.damaged-8"):  # the clock does not run
        path.write_bytes(b"\0" * 20)
        found = sealed.read_or_set_aside(path, dict, 7)
        assert isinstance(found, sealed.Damaged)
        assert found.what.endswith(f"set aside as {name}")
        assert path.with_name(name).read_bytes() == b"\0" * 20
        assert sealed.read(path, dict) is None


def test_where_it_cannot_be_set_aside_it_is_not_believed_either(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, stamp: int) -> Path:
        raise StorageFault(Reason.STORAGE_FAULT, "read-only file system", "")

    path.write_bytes(b"{")
    monkeypatch.setattr(files, "set_aside", refuse)
    found = sealed.read_or_set_aside(path, dict, 7)
    assert isinstance(found, sealed.Damaged)
    assert "cannot be set aside: read-only file system" in found.what


def test_what_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(StorageFault):
        sealed.read_or_set_aside(tmp_path, dict, 7)
