"""The start counter on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_agent import files
from edge_agent.serving.starts import Starts
from edge_contract.errors import Reason, StorageFault

A, B = "a" * 64, "b" * 64


def test_starts_are_counted_by_digest_and_forgotten_once_survived(tmp_path: Path) -> None:
    starts = Starts(tmp_path / "starts", tmp_path / "spare")
    assert starts.failed("m", A) == 0
    for _ in range(3):
        starts.begin("m", A)
    starts.begin("m", B)
    again = Starts(tmp_path / "starts", tmp_path / "spare")
    assert (again.failed("m", A), again.failed("m", B), again.failed("other", A)) == (3, 1, 0)
    again.survived("m", A)
    assert (again.failed("m", A), again.failed("m", B)) == (0, 1)
    again.survived("m", B)
    assert not (tmp_path / "starts" / "m.json").exists()


def test_a_start_that_was_ended_from_outside_is_taken_back(tmp_path: Path) -> None:
    starts = Starts(tmp_path, tmp_path / "spare")
    starts.begin("m", A)
    starts.begin("m", A)
    starts.abandoned("m", A)
    assert starts.failed("m", A) == 1
    starts.abandoned("m", A)
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"{", b'{"schema": 1, "failed": {"x": 1}}'])
def test_a_damaged_file_counts_from_zero_and_is_said(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m.json").write_bytes(content)
    starts = Starts(tmp_path, tmp_path / "spare")
    assert starts.failed("m", A) == 0
    assert "start counter of m" in caplog.text
    starts.begin("m", A)
    assert starts.failed("m", A) == 1


def test_without_any_place_to_write_nothing_is_counted_and_serving_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("starts", "spare"):
        (tmp_path / name).write_text("a file where a folder belongs")
    starts = Starts(tmp_path / "starts", tmp_path / "spare")
    starts.begin("m", A)
    starts.survived("m", A)
    assert starts.failed("m", A) == 0
    assert "nothing is counted" in caplog.text


def test_a_disk_that_takes_nothing_is_counted_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is with a disk that the kernel has made read-only; what it holds is older from then on."""
    disk, spare = tmp_path / "starts", tmp_path / "spare"
    Starts(disk, spare).begin("m", A)
    real = files.write

    def read_only(path: Path, data: bytes) -> None:
        if path.parent == disk:
            raise StorageFault(Reason.STORAGE_FAULT, f"{path}: Read-only file system", "repair it")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", read_only)
        for _ in range(2):
            Starts(disk, spare).begin("m", A)
        Starts(disk, spare).begin("m", B)
        assert (Starts(disk, spare).failed("m", A), Starts(disk, spare).failed("m", B)) == (3, 1)
        Starts(disk, spare).survived("m", A)
        assert Starts(disk, spare).failed("m", A) == 0
    Starts(disk, spare).begin("m", A)  # writable again
    assert not (spare / "m.json").exists()
    assert Starts(disk, spare).failed("m", B) == 1


def test_the_file_is_plain_to_read(tmp_path: Path) -> None:
    Starts(tmp_path, tmp_path / "spare").begin("m", A)
    assert json.loads((tmp_path / "m.json").read_text()) == {"schema": 1, "failed": {A: 1}}
