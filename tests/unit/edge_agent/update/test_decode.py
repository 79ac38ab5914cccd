"""The decode child: what it makes, what it refuses, and that its limit of memory holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from edge_agent.update import decode
from edge_agent.update.children import Child, Ended
from edge_agent.update.decode import INTERPRETER_BYTES, Task
from edge_agent.update.leash import Limits
from edge_contract import encodings
from edge_contract.errors import BundleRejected, DeviceUnfit, Reason, StorageFault
from fleet.registry.encode import candidates, zstd
from fleet.registry.encode.candidates import Candidate
from tests.support import weights
from tests.support.waiting import wait_for

CASE = weights.cases(weights.layers(weights.SMALL))[0]
MADE = {c.algorithm: c for c in (*candidates.patches(CASE.base, CASE.new), candidates.whole(CASE.new))}
ALGORITHMS = sorted(MADE)
# From the same base, and much more than the model.
BOMB = bytes(4 << 20)
BOMBS = {c.algorithm: c for c in (*candidates.patches(CASE.base, BOMB), candidates.whole(BOMB))}


def test_there_is_a_decoder_for_everything_that_is_made() -> None:
    assert set(MADE) == encodings.PATCHES | encodings.WHOLE


def task(folder: Path, made: Candidate, base: bytes = CASE.base, new: bytes = CASE.new) -> Task:
    (folder / "encoded").write_bytes(made.data)
    (folder / "base").write_bytes(base)
    return Task(
        made.algorithm,
        folder / "encoded",
        folder / "base" if made.algorithm in encodings.PATCHES else None,
        folder / "result",
        len(new),
        hashlib.sha256(new).hexdigest(),
        made.memory_bytes,
    )


def run(task: Task, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    code = decode.run_decode(task)
    return code, json.loads(capsys.readouterr().out)


def as_child(task: Task, memory_bytes: int) -> Ended:
    arguments = ["decode", task.algorithm, str(task.encoded), str(task.result)]
    arguments += [str(task.size_bytes), task.sha256, str(task.memory_bytes)]
    arguments += ["--base", str(task.base)] if task.base else []
    child = Child(arguments, timeout_s=60, limits=Limits(memory_bytes=memory_bytes))
    ended = wait_for(child.ended, "the decode child", timeout_s=60)
    assert ended is not None
    return ended


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_blob_comes_out_within_the_memory_that_is_named(algorithm: str, tmp_path: Path) -> None:
    ended = as_child(job := task(tmp_path, MADE[algorithm]), INTERPRETER_BYTES + MADE[algorithm].memory_bytes)
    assert (ended.code, ended.last) == (0, {"event": "done"}), ended
    assert job.result.read_bytes() == CASE.new


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("damage", ["cut", "zeros", "bit", "empty", "longer"])
def test_a_damaged_encoding_is_refused(
    algorithm: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = MADE[algorithm].data
    middle = len(data) // 2
    wrong = {
        "cut": data[:middle],
        "zeros": data[:middle] + bytes(len(data) - middle),
        "bit": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
        "empty": b"",
        "longer": data + b"\0",
    }[damage]
    code, told = run(task(tmp_path, MADE[algorithm]._replace(data=wrong)), capsys)
    assert (code, told["reason"]) == (BundleRejected.exit_code, Reason.DIGEST_MISMATCH)


@pytest.mark.parametrize("algorithm", sorted(encodings.PATCHES))
@pytest.mark.parametrize("base", [b"", b"something else", CASE.base[:-1], bytes(len(CASE.base))])
def test_a_wrong_base_is_refused(
    algorithm: str, base: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = run(task(tmp_path, MADE[algorithm], base), capsys)
    assert (code, told["reason"]) == (BundleRejected.exit_code, Reason.DIGEST_MISMATCH)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_result_that_grows_beyond_its_size_is_cut_short(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bomb must not fill the disk."""
    job = task(tmp_path, BOMBS[algorithm])
    code, told = run(job, capsys)
    assert (code, told["reason"]) == (BundleRejected.exit_code, Reason.DIGEST_MISMATCH)
    assert job.result.stat().st_size <= len(CASE.new)


def test_a_patch_that_needs_more_memory_than_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MADE[encodings.LANES]._replace(memory_bytes=1000)
    code, told = run(task(tmp_path, made), capsys)
    assert (code, told["reason"]) == (DeviceUnfit.exit_code, Reason.MEMORY_TOO_SMALL)


def test_memory_beyond_the_limit_is_not_to_be_had(tmp_path: Path) -> None:
    """A patch that needs the base in memory; the process has a quarter of it."""
    base = bytes(80 << 20)
    frame = zstd.patch(base, CASE.new)
    assert frame is not None
    assert frame.memory_bytes > 80 << 20
    job = task(tmp_path, Candidate(encodings.ZSTD_PATCH, *frame), base)
    assert as_child(job, INTERPRETER_BYTES + frame.memory_bytes).code == 0
    ended = as_child(job, INTERPRETER_BYTES + frame.memory_bytes // 4)
    assert ended.code in (DeviceUnfit.exit_code, BundleRejected.exit_code), ended
    assert "memory" in ended.failure()[1]


def test_a_disk_without_space_is_the_disks_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = task(tmp_path, MADE[encodings.LANES])._replace(result=Path("/dev/full"))
    code, told = run(job, capsys)
    assert (code, told["reason"]) == (StorageFault.exit_code, Reason.DISK_FULL)
