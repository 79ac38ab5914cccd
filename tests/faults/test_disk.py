"""Every operation on the disk fails once; disks that are full or read-only; the seam is what strace does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import chains
from tests.faults.conftest import Cases
from tests.support.mounts import mount_tmpfs, remount, unmount
from tests.support.rig import INJECT, NAMING, WRITING, Plan, Rig, Shelf
from tests.support.small_disk import fill

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parent.parent.parent
# Which errors an operation can end with. A signal (EINTR) cuts off what waits for the disk.
ERRORS = {
    "EIO": (*NAMING, *WRITING),
    "ENOSPC": (*NAMING, *WRITING),
    "EROFS": (*NAMING, "open"),
    "EINTR": WRITING,
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def rig(shelf: Shelf) -> Iterator[Rig]:
    with Rig(shelf) as rig:
        yield rig


def test_every_kind_of_operation_fails_once(rig: Rig, cases: Cases) -> None:
    """The part that every test run can afford; the rest is below."""
    chains.run(rig, Plan(["run", "fetch"], "EIO", operations=ERRORS["EIO"], grain="kind"), cases)


@pytest.mark.thorough
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("process", ["run", "fetch"])
def test_every_operation_fails_once(rig: Rig, cases: Cases, process: str, error: str) -> None:
    plan = Plan([process], error, operations=ERRORS[error])
    assert len(chains.run(rig, plan, cases, timeout_s=500)) >= 20


@pytest.mark.thorough
def test_every_write_writes_half(rig: Rig, cases: Cases) -> None:
    plan = Plan(["run", "fetch", "preflight"], "SHORT", operations=("write",))
    assert len(chains.run(rig, plan, cases)) >= 10


@pytest.mark.thorough
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_every_operation_of_the_inference_process_fails_once(rig: Rig, cases: Cases, error: str) -> None:
    """A disk that takes no start counter keeps no model from being served."""
    # Not what it opens to read: a model that cannot be read is not loaded, and its index says so.
    rig.plan(Plan(["serve"], error, operations=(*NAMING, "write", "fsync")))
    hit: list[str] = []
    while True:
        rig.start("serve")
        rig.assert_answers_among(2)
        if rig.hit == hit:
            break
        for point in rig.hit[len(hit) :]:
            cases.add(point, error)
        hit = rig.hit
        rig.end("serve")
    assert len(hit) >= 4


# whole disks


@pytest.fixture
def own_disk(shelf: Shelf) -> Iterator[Rig]:
    """A device whose state lies on a small disk of its own."""
    mounted: list[Path] = []

    def prepare(state: Path) -> None:
        mount_tmpfs(state, 4 << 20)
        mounted.append(state)

    try:
        rig = Rig(shelf, prepare=prepare, disk_reserve_bytes=64 << 10)
        try:
            yield rig
        finally:
            rig.end("run")
            rig.end("serve")
            unmount(mounted.pop())
            rig.close()
    finally:
        for folder in mounted:
            unmount(folder)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_takes_nothing_at_the_start_keeps_nothing_from_running(
    own_disk: Rig, cases: Cases, trouble: str
) -> None:
    rig, state = own_disk, own_disk.layout.state
    rig.want(3)
    filler = fill(state)
    if trouble == "read-only":
        filler.unlink()
        remount(state, "ro")
    cases.add("start of all processes", trouble)
    rig.start("serve")
    rig.start("run")
    rig.until(lambda: "control process of" in rig.device.log, "the control process")
    rig.until(lambda: "storage_fault" in rig.device.log or "disk_full" in rig.device.log, "the report")
    rig.assert_sound(2)
    assert rig.ended("run") is None
    if trouble == "read-only":
        remount(state, "rw")
    else:
        filler.unlink()
    rig.until(lambda: rig.settled, "the update, once the disk takes something again")
    rig.assert_complete(3, 2)
    assert rig.ended("run") is None


# The seam: what sitecustomize does to a function of Python is what the kernel's error does to it.

_SCRIPT = """
import sys
from pathlib import Path
from edge_agent import files
folder = Path(sys.argv[2])
(folder / "f").write_bytes(b"old")
(folder / "tree").mkdir()
(folder / "tree" / "x").write_bytes(b"x")
(folder / "built").mkdir()
(folder / "built" / "y").write_bytes(b"y")
(folder / "link").symlink_to("old")
work = {
    "write": lambda: files.write(folder / "f", b"new"),
    "swap_link": lambda: files.swap_link(folder / "link", "new"),
    "remove_tree": lambda: files.remove_tree(folder / "tree"),
    "install_folder": lambda: files.install_folder(folder / "built", folder / "final"),
    "replace_folder": lambda: files.replace_folder(folder / "built", folder / "tree"),
    "move": lambda: files.move(folder / "f", folder / "g"),
    "hard_link": lambda: files.hard_link(folder / "f", folder / "h"),
    "make_folder": lambda: files.make_folder(folder / "new"),
}
(folder / "armed").touch()
try:
    work[sys.argv[3]]()
except Exception as e:
    print(type(e).__name__, e)
"""
# function of files.py, operation of Python, system call, the path it is about (of a rename, the new one; and
# the old one, by which strace knows it)
SEAM = [
    ("write", "open", "openat", ".f.tmp"),
    ("write", "write", "write", ".f.tmp"),
    ("write", "fsync", "fsync", ".f.tmp"),
    ("write", "replace", "rename", "f < .f.tmp"),
    ("swap_link", "symlink", "symlink", ".link.tmp"),
    ("swap_link", "replace", "rename", "link < .link.tmp"),
    ("remove_tree", "rename", "rename", ".tree.tmp < tree"),
    ("install_folder", "fsync", "fsync", "built/y"),
    ("install_folder", "syncfs", "syncfs", "built"),
    ("install_folder", "rename", "rename", "final < built"),
    ("replace_folder", "exchange", "renameat2", "tree"),
    ("move", "replace", "rename", "g < f"),
    ("hard_link", "link", "link,linkat", "h"),
    ("make_folder", "mkdir", "mkdir", "new"),
]


@pytest.mark.parametrize("error", ["EIO", pytest.param("EROFS", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(("function", "operation", "call", "path"), SEAM)
def test_the_seam_is_what_the_kernel_does(
    tmp_path: Path, cases: Cases, function: str, operation: str, call: str, path: str, error: str
) -> None:
    path, _, traced = path.partition(" < ")
    by_kernel, by_seam = tmp_path / "kernel", tmp_path / "seam"
    for folder in (by_kernel, by_seam):
        folder.mkdir()
    command = [os.path.realpath(sys.executable), "-c", _SCRIPT, "run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, sys.path[1:])])}
    strace = ["strace", "-qq", "-o", str(tmp_path / "trace"), "-P", str(by_kernel / (traced or path))]
    strace += ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=1"]
    said = [_run([*strace, *command, str(by_kernel), function], environment)]
    plan = Plan(["run"], error, operations=[operation], only=str(by_seam / path))._asdict()
    plan |= {"root": str(by_seam), "done": str(tmp_path / "done"), "model": "tiny"}
    environment |= {"PYTHONPATH": f"{INJECT}{os.pathsep}{environment['PYTHONPATH']}"}
    environment |= {"EDGEWARD_FAULTS": json.dumps(plan)}
    said.append(_run([*command, str(by_seam), function], environment))
    cases.add(f"files.{function}: {operation}", error)
    assert os.strerror(getattr(errno, error)) in said[0]
    assert said[0].replace("/kernel", "") == said[1].replace("/seam", "")
    assert _tree(by_kernel) == _tree(by_seam)


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _tree(folder: Path) -> dict[str, str]:
    def content(path: Path) -> str:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_text() if path.is_file() else "folder"

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}
