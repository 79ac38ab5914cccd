"""The record of verified versions: cheap while nothing changed, never trusted when something did."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_agent import files, verified
from edge_agent.config import Config
from edge_agent.layout import MANIFEST, Layout
from edge_contract.errors import BundleRejected, Reason, StorageFault
from tests.support.models import BundleOnDisk, install, make_bundle


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(Config(tenant="t", device="d", state_dir=str(tmp_path / "state")))


@pytest.fixture
def bundle(tmp_path: Path, layout: Layout) -> BundleOnDisk:
    made = make_bundle(tmp_path)
    install(made, layout)
    return made


def model(layout: Layout, bundle: BundleOnDisk) -> Path:
    return layout.version(bundle.digest) / "model.onnx"


def flip(path: Path) -> None:
    """One bit, and the times of before: what a disk does by itself."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_was_hashed_once_is_not_hashed_again(layout: Layout, bundle: BundleOnDisk) -> None:
    assert verified.check(layout, bundle.digest, 1000)
    assert not verified.check(layout, bundle.digest, 2000)
    found = verified.record(layout, bundle.digest)
    assert found is not None
    assert (found.hashed_ms, set(found.files)) == (
        1000,
        {MANIFEST, *(f.name for f in bundle.manifest.files)},
    )


def test_an_installed_version_needs_no_hashing(layout: Layout, bundle: BundleOnDisk) -> None:
    verified.remember(layout, bundle.digest, 1000)
    assert not verified.check(layout, bundle.digest, 2000)


@pytest.mark.parametrize("change", ["touched", "moved", "record damaged", "record gone", "record of another"])
def test_what_is_not_as_recorded_is_hashed_and_recorded_anew(
    layout: Layout, bundle: BundleOnDisk, change: str
) -> None:
    verified.check(layout, bundle.digest, 1000)
    path, record = model(layout, bundle), layout.verified(bundle.digest)
    match change:
        case "touched":
            os.utime(path, ns=(1, 1))
        case "moved":
            data = path.read_bytes()
            path.rename(path.with_name("old"))
            path.write_bytes(data)
            path.with_name("old").unlink()
        case "record damaged":
            record.write_bytes(record.read_bytes().replace(b"1000", b"1001"))
        case "record gone":
            record.unlink()
        case "record of another":
            record.write_bytes(record.read_bytes().replace(bundle.digest.encode(), b"0" * 64))
    assert verified.check(layout, bundle.digest, 2000)
    assert not verified.check(layout, bundle.digest, 3000)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("flipped", "model.onnx of version .* is damaged"),
        ("zeroed", "model.onnx of version .* is damaged"),
        ("cut", "model.onnx of version .* has 10 bytes instead of"),
        ("missing", "model.onnx of version .* is missing"),
        ("manifest flipped", "the manifest of version .* is damaged"),
        ("manifest missing", "the manifest of version .* is missing"),
        ("folder missing", "the manifest of version .* is missing"),
    ],
)
def test_damage_is_found_named_and_not_forgotten(
    layout: Layout, bundle: BundleOnDisk, damage: str, says: str
) -> None:
    verified.check(layout, bundle.digest, 1000)
    path = model(layout, bundle)
    match damage:
        case "flipped":
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        case "zeroed":
            path.write_bytes(bytes(path.stat().st_size))
        case "cut":
            path.write_bytes(path.read_bytes()[:10])
        case "missing":
            path.unlink()
        case "manifest flipped":
            (path.parent / MANIFEST).write_bytes((path.parent / MANIFEST).read_bytes().replace(b"1", b"3", 1))
        case "manifest missing":
            (path.parent / MANIFEST).unlink()
        case "folder missing":
            files.remove_tree(path.parent)
    for _ in range(2):
        with pytest.raises(BundleRejected, match=says) as fault:
            verified.check(layout, bundle.digest, 2000)
        expected = Reason.BLOB_MISSING if damage == "missing" else Reason.DIGEST_MISMATCH
        assert fault.value.reason is expected
    assert verified.record(layout, bundle.digest) is None


def test_a_bit_that_flips_behind_the_record_is_found_by_reading_all(
    layout: Layout, bundle: BundleOnDisk
) -> None:
    verified.check(layout, bundle.digest, 1000)
    flip(model(layout, bundle))
    assert not verified.check(layout, bundle.digest, 2000)  # nothing tells
    read: list[int] = []
    with pytest.raises(BundleRejected, match="is damaged"):
        verified.rehash(layout, bundle.digest, 3000, read.append)
    assert sum(read) >= bundle.manifest.file("model").size_bytes
    with pytest.raises(BundleRejected, match="is damaged"):
        verified.check(layout, bundle.digest, 4000)  # from now on every start finds it


def test_a_disk_that_does_not_answer_is_no_verdict(
    layout: Layout, bundle: BundleOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.read

    def read(descriptor: int, count: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("model.onnx"):
            raise OSError(5, "Input/output error")
        return real(descriptor, count)

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(StorageFault, match=r"model\.onnx: Input/output error"):
        verified.check(layout, bundle.digest, 1000)


def test_a_process_that_may_not_write_records_hashes_each_time(
    layout: Layout, bundle: BundleOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes, mode: int = 0) -> None:
        raise StorageFault(Reason.STORAGE_FAULT, "read-only file system", "")

    monkeypatch.setattr(files, "write", refuse)
    assert verified.check(layout, bundle.digest, 1000)
    assert verified.check(layout, bundle.digest, 1000)
