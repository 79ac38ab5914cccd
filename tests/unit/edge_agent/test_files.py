"""edge_agent.files: each function's effect, what cut-off ones leave, full disks, order of syscalls."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent import files
from edge_contract.errors import Reason, StorageFault
from tests.support.small_disk import small_disk


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# effects


def test_make_folder_makes_parents_and_leaves_an_existing_one_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"
    files.make_folder(folder)
    (folder / "x").write_text("kept")
    files.make_folder(folder)
    assert names(folder) == ["x"]
    assert folder.stat().st_mode & 0o777 == 0o750 & ~_umask()


def test_write_replaces_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.write(path, b"a longer content")
    files.write(path, b"short", mode=0o600)
    assert path.read_bytes() == b"short"
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["f"]


def test_write_gets_over_what_a_cut_off_write_left(tmp_path: Path) -> None:
    (tmp_path / ".f.tmp").write_bytes(b"half of something much longer")
    files.write(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert names(tmp_path) == ["f"]


def test_read_tells_missing_from_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert files.read(tmp_path / "empty") == b""
    assert files.read(tmp_path / "missing") is None


def test_install_folder_moves_it_whole(tmp_path: Path) -> None:
    built = tmp_path / "built"
    (built / "sub").mkdir(parents=True)
    (built / "sub" / "x").write_text("1")
    files.install_folder(built, tmp_path / "final")
    assert (tmp_path / "final" / "sub" / "x").read_text() == "1"
    assert not built.exists()


def test_install_folder_keeps_what_is_there_already(tmp_path: Path) -> None:
    for name, text in (("built", "new"), ("final", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(text)
    files.install_folder(tmp_path / "built", tmp_path / "final")
    assert (tmp_path / "final" / "x").read_text() == "old"
    assert names(tmp_path) == ["final"]


def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    built, final = tmp_path / "built", tmp_path / "final"
    for folder, text in ((built, "new"), (final, "damaged")):
        folder.mkdir()
        (folder / "x").write_text(text)
    return built, final


def test_replace_folder_puts_one_in_the_place_of_the_other(tmp_path: Path) -> None:
    built, final = two_folders(tmp_path)
    inode = built.stat().st_ino
    files.replace_folder(built, final)
    assert (final / "x").read_text() == "new"
    assert final.stat().st_ino == inode
    assert names(tmp_path) == ["final"]


def test_replace_folder_never_leaves_the_name_without_a_folder(tmp_path: Path) -> None:
    built, final = two_folders(tmp_path)
    seen, stop = set(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            try:
                seen.add((final / "x").read_text())
            except FileNotFoundError:
                seen.add("nothing")

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(30):
        files.replace_folder(built, final)
        built.mkdir()
        (built / "x").write_text("new")
    stop.set()
    watcher.join()
    assert seen <= {"damaged", "new"}


def test_replace_folder_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(a: Path, b: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", str(b))

    built, final = two_folders(tmp_path)
    monkeypatch.setattr(files, "_exchange", refuse)
    files.replace_folder(built, final)
    assert (final / "x").read_text() == "new"
    assert names(tmp_path) == ["final"]


def test_a_call_that_a_signal_cut_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [-1, -1, 0]

    class Library:
        @staticmethod
        def syncfs(descriptor: int) -> int:
            ctypes.set_errno(errno.EINTR)
            return answers.pop(0)

    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Library)
    files._syncfs(tmp_path)
    assert answers == []


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_needs_no_disk_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        (tmp_path / "lock").touch()
    real = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", read_only)
    first = files.try_lock(tmp_path / "lock")
    assert first is not None
    assert files.try_lock(tmp_path / "lock") is None
    os.close(first)
    with files.held(tmp_path / "lock") as alone:
        assert alone


def test_move_replaces(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    files.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"
    assert names(tmp_path) == ["b"]


def test_swap_link_points_and_points_again(tmp_path: Path) -> None:
    link = tmp_path / "new" / "folder" / "current"
    files.swap_link(link, "../store/one")
    assert files.link_target(link) == "one"
    files.swap_link(link, "../store/two")
    assert files.link_target(link) == "two"
    assert names(link.parent) == ["current"]


def test_swap_link_gets_over_what_a_cut_off_swap_left(tmp_path: Path) -> None:
    (tmp_path / ".current.tmp").symlink_to("elsewhere")
    files.swap_link(tmp_path / "current", "one")
    assert files.link_target(tmp_path / "current") == "one"
    assert names(tmp_path) == ["current"]


def test_links_that_are_not_there(tmp_path: Path) -> None:
    assert files.link_target(tmp_path / "none") is None
    files.remove_link(tmp_path / "none")
    files.remove_link(tmp_path / "no" / "folder" / "either")


def test_something_else_under_a_links_name_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert files.link_target(tmp_path / "file") is None


def test_names_of_what_is_there_and_of_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    (tmp_path / "a").mkdir()
    assert files.names(tmp_path) == ["a", "b"]
    assert files.names(tmp_path / "missing") == files.names(tmp_path / "b") == []


def test_remove_link_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    files.swap_link(tmp_path / "link", "target")
    files.remove_link(tmp_path / "link")
    assert names(tmp_path) == ["target"]


def test_hard_link_gives_the_same_file_a_second_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("once on the disk")
    files.hard_link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino


def test_hard_link_copies_where_links_are_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "as on a FAT filesystem", str(target))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("twice on the disk")
    files.hard_link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "twice on the disk"


def test_remove_tree_and_what_a_cut_off_removal_left(tmp_path: Path) -> None:
    for name in ("v1", ".v1.tmp"):
        (tmp_path / name / "deep").mkdir(parents=True)
    files.remove_tree(tmp_path / "v1")
    assert names(tmp_path) == []
    files.remove_tree(tmp_path / "v1")


def test_remove_leftovers_removes_only_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".v1.tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".f.tmp").write_text("half")
    (tmp_path / ".link.tmp").symlink_to("kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / ".lock").touch()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".lock", "kept"]
    files.remove_leftovers(tmp_path / "missing")


def test_of_what_is_set_aside_the_newest_two_stay(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    (tmp_path / "f.json.damaged-by-hand").touch()
    (tmp_path / "g.json.damaged-1").touch()
    for stamp, text in ((9, "a"), (10, "b"), (10, "c"), (12, "d"), (3, "e")):  # the clock was set back
        path.write_text(text)
        aside = files.set_aside(path, stamp)
        assert aside.read_text() == text
    kept = {p.name: p.read_text() for p in tmp_path.glob("*.damaged-*")}
    assert kept == {
        "f.json.damaged-3": "e",
        "f.json.damaged-12": "d",
        "f.json.damaged-by-hand": "",
        "g.json.damaged-1": "",
    }


def test_set_aside_keeps_the_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text("damaged")
    aside = files.set_aside(tmp_path / "f.json", 1234)
    assert aside == tmp_path / "f.json.damaged-1234"
    assert aside.read_text() == "damaged"
    assert not (tmp_path / "f.json").exists()


def test_free_bytes_is_what_the_filesystem_says(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert files.free_bytes(tmp_path) == pytest.approx(status.f_bavail * status.f_frsize, rel=0.2)


# locks


_HOLD = """
import sys, time
from pathlib import Path
from edge_agent import files
lock = files.lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_keeps_another_process_out_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert files.try_lock(path) is None
        holder.kill()
        holder.wait()
    descriptor = files.try_lock(path)
    assert descriptor is not None
    assert files.try_lock(path) is None
    os.close(descriptor)


# faults


def test_a_write_that_does_not_fit_leaves_the_old_content(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        path = disk.folder / "f"
        files.write(path, b"old" * 100)
        with pytest.raises(StorageFault, match=re.escape(str(disk.folder))) as fault:
            files.write(path, b"x" * (2 << 20))
        assert fault.value.reason is disk.reason
        assert path.read_bytes() == b"old" * 100
        assert names(disk.folder) == ["f"]
        files.write(path, b"fits again")
        assert path.read_bytes() == b"fits again"


@pytest.mark.parametrize(
    "operation",
    [
        lambda p: files.write(p / "missing" / "f", b""),
        lambda p: files.read(p),
        lambda p: files.make_folder(p / "file" / "below"),
        lambda p: files.install_folder(p / "missing", p / "final"),
        lambda p: files.move(p / "missing", p / "target"),
        lambda p: files.swap_link(p / "folder", "target"),
        lambda p: files.remove_link(p / "folder"),
        lambda p: files.link_target(p / "file" / "below"),
        lambda p: files.names(p / ("x" * 300)),
        lambda p: files.hard_link(p / "missing", p / "x"),
        lambda p: files.sync_file(p / "missing"),
        lambda p: files.sync_folder(p / "file"),
        lambda p: files.lock(p / "missing" / "lock"),
        lambda p: files.try_lock(p / "missing" / "lock"),
        lambda p: files.free_bytes(p / "missing"),
    ],
)
def test_every_fault_is_a_storage_fault_that_names_the_path(
    operation: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").touch()
    (tmp_path / "file").touch()
    before = names(tmp_path)
    with pytest.raises(StorageFault, match=re.escape(str(tmp_path))) as fault:
        operation(tmp_path)
    assert fault.value.reason is Reason.STORAGE_FAULT
    assert [n for n in names(tmp_path) if not n.endswith(".tmp")] == before


# atomicity


def test_swap_link_is_never_seen_half_done(tmp_path: Path) -> None:
    link = tmp_path / "current"
    files.swap_link(link, "one")
    seen, problems = _watch(lambda: os.readlink(link), lambda i: files.swap_link(link, ("one", "two")[i % 2]))
    assert problems == []
    assert seen == {"one", "two"}


def test_write_is_never_seen_half_done(tmp_path: Path) -> None:
    path = tmp_path / "f"
    contents = (b"1" * 70_000, b"2" * 30_000)
    files.write(path, contents[0])
    seen, problems = _watch(path.read_bytes, lambda i: files.write(path, contents[i % 2]))
    assert problems == []
    assert seen == set(contents)


def _watch(
    look: Callable[[], object], change: Callable[[int], None], rounds: int = 200
) -> tuple[set[object], list[OSError]]:
    """What a reader sees, again and again, while `change` runs."""
    seen: set[object] = set()
    problems: list[OSError] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                seen.add(look())
            except OSError as e:
                problems.append(e)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(rounds):
        change(i)
    done.set()
    reader.join()
    return seen, problems


# durability: in which order the kernel is asked, since a missing fsync shows only in a power cut

_SCRIPT = """
import os, sys
from pathlib import Path
from edge_agent import files
root = Path(sys.argv[1])
def mark(name):
    try: os.stat(f"/mark-{name}")
    except OSError: pass
(root / "built").mkdir(); (root / "built" / "x").write_text("x"); (root / "m").write_text("m")
(root / "old").mkdir()
mark("write"); files.write(root / "f", b"data")
mark("install_folder"); files.install_folder(root / "built", root / "final")
mark("swap_link"); files.swap_link(root / "current", "final")
mark("move"); files.move(root / "m", root / "n")
mark("remove_tree"); files.remove_tree(root / "old")
mark("remove_link"); files.remove_link(root / "current")
mark("make_folder"); files.make_folder(root / "p" / "q")
mark("end")
"""
_CALLS = "newfstatat,stat,openat,fsync,syncfs,rename,renameat,renameat2,symlink,symlinkat,unlink,mkdir,rmdir"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Function → what it asked of the kernel, in order, as `call name` with names relative to its folder."""
    root = tmp_path_factory.mktemp("traced")
    log = root.with_suffix(".strace")
    command = ["strace", "-f", "-y", "-e", f"trace={_CALLS}", "-o", str(log)]
    subprocess.run([*command, sys.executable, "-c", _SCRIPT, str(root)], check=True, timeout=60)
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in log.read_text().splitlines():
        if marked := re.search(r'"/mark-(\w+)"', line):
            current = found.setdefault(marked.group(1), [])
        elif str(root) in line and " = -1 " not in line:
            call = re.sub(r"^\d+ +", "", line).partition("(")[0].removesuffix("at2").removesuffix("at")
            paths = re.findall(rf"{re.escape(str(root))}/?([^\">]*)", line)
            current.append(f"{call} {paths[0] or '/'}")
    return found


@pytest.mark.parametrize(
    ("function", "steps"),
    [
        ("write", ["fsync .f.tmp", "rename .f.tmp", "fsync /"]),
        ("install_folder", ["fsync built/x", "fsync built", "syncfs built", "rename built", "fsync /"]),
        ("swap_link", ["symlink .current.tmp", "rename .current.tmp", "fsync /"]),
        ("move", ["rename m", "fsync /"]),
        ("remove_tree", ["rename old", "fsync /", "rmdir .old.tmp"]),
        ("remove_link", ["unlink current", "fsync /"]),
        ("make_folder", ["mkdir p", "mkdir p/q", "fsync p", "fsync /"]),
    ],
)
def test_names_become_durable_only_after_contents(
    traced: dict[str, list[str]], function: str, steps: list[str]
) -> None:
    wanted = {"fsync", "syncfs", "rename", "symlink", "unlink", "mkdir", "rmdir"}
    assert [s for s in traced[function] if s.split()[0] in wanted] == steps


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
