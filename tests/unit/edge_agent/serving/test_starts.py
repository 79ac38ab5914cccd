"""The start counter on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_agent.serving.starts import Starts

A, B = "a" * 64, "b" * 64


def test_starts_are_counted_by_digest_and_forgotten_once_survived(tmp_path: Path) -> None:
    starts = Starts(tmp_path / "starts")
    assert starts.failed("m", A) == 0
    for _ in range(3):
        starts.begin("m", A)
    starts.begin("m", B)
    again = Starts(tmp_path / "starts")
    assert (again.failed("m", A), again.failed("m", B), again.failed("other", A)) == (3, 1, 0)
    again.survived("m", A)
    assert (again.failed("m", A), again.failed("m", B)) == (0, 1)
    again.survived("m", B)
    assert not (tmp_path / "starts" / "m.json").exists()


def test_a_start_that_was_ended_from_outside_is_taken_back(tmp_path: Path) -> None:
    starts = Starts(tmp_path)
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
    starts = Starts(tmp_path)
    assert starts.failed("m", A) == 0
    assert "start counter of m" in caplog.text
    starts.begin("m", A)
    assert starts.failed("m", A) == 1


def test_a_disk_that_cannot_be_written_does_not_stop_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "starts").write_text("a file where a folder belongs")
    starts = Starts(tmp_path / "starts")
    starts.begin("m", A)
    starts.survived("m", A)
    assert starts.failed("m", A) == 0
    assert "cannot be" in caplog.text


def test_the_file_is_plain_to_read(tmp_path: Path) -> None:
    Starts(tmp_path).begin("m", A)
    assert json.loads((tmp_path / "m.json").read_text()) == {"schema": 1, "failed": {A: 1}}
