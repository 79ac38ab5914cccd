"""What happens to metadata and its floor, on the way and on the disk, never lowers protection, never bricks.

After each fault the device is asked two things: an honest registry must be followed again, and a registry
that replays what was signed before must be refused. Its floor must not have sunk.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.update.levels import Level
from edge_contract.errors import Reason, TransferFailed
from tests.faults.conftest import Cases
from tests.support.http_registry import Answer, FolderServer, cut, endless, hang_up, status, whole
from tests.support.trust_box import TrustBox
from tests.support.tuf_repository import TufRepository

NAME = "models/a"
DAY_S = 86400
Damage = Callable[[Path, Path], object]


class Scene:
    """A device that has followed two generations of a registry, which has signed a third since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = TufRepository(folder / "registry")
        self.repository.delegate("team", "models/*")
        self.repository.add(NAME, b"a", "team")
        self.repository.rotate("targets")
        self.repository.sign()
        self.server = FolderServer(self.repository.folder)
        self.server.start()
        self.box = TrustBox(folder / "box", self.repository.root_path, self.server)
        self.box.refresh(NAME)
        self.old_box = shutil.copytree(self.box.folder, folder / "old-box", symlinks=True)
        self.old = self.repository.copy_files(folder / "old")
        self.repository.rotate("root", count=3, threshold=2)
        self.repository.sign()
        self.box.refresh(NAME)
        self.levels = dict(self.box.floor.value.roles)
        self.kept = shutil.copytree(self.box.folder, folder / "kept", symlinks=True)
        self.repository.sign()

    def reset(self) -> None:
        """The device as it was."""
        self.server.instead.clear()
        self.server.folder = self.repository.folder
        shutil.rmtree(self.box.folder)
        shutil.copytree(self.kept, self.box.folder, symlinks=True)

    def assert_protected(self) -> None:
        """The replay is refused, with the floor where it was; the honest registry is followed."""
        self.server.folder = self.old
        with pytest.raises(TransferFailed) as fault:
            self.box.refresh(NAME)
        assert fault.value.reason is Reason.TRUST_FAILED
        self.assert_not_sunk()
        self.assert_follows()

    def assert_not_sunk(self) -> None:
        found = self.box.floor.value.roles
        assert all(found.get(role, Level(1, [])).version >= lv.version for role, lv in self.levels.items())

    def assert_follows(self) -> None:
        self.server.folder = self.repository.folder
        trust = self.box.refresh()
        assert trust.target(NAME) is not None
        assert self.box.versions()["timestamp"] == self.repository.timestamp.version
        assert self.box.floor.problems == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    scene = Scene(tmp_path_factory.mktemp("scene"))
    yield scene
    scene.server.stop()


@pytest.fixture
def scene(built: Scene) -> Scene:
    built.reset()
    return built


def _flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Damage] = {
    "deleted": lambda path, _: path.unlink(),
    "emptied": lambda path, _: path.write_bytes(b""),
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeroed": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "bit flipped": _flip,
    "older again": lambda path, old: path.write_bytes(old.read_bytes()) if old.exists() else path.unlink(),
    "a folder instead": _folder,
}
LOCAL = (
    *("timestamp.json", "snapshot.json", "targets.json", "team.json"),
    *(f"root_history/{n}.root.json" for n in (1, 2, 3)),
)


@pytest.mark.parametrize("file", LOCAL)
def test_local_metadata_may_be_anything(scene: Scene, cases: Cases, file: str) -> None:
    for kind, damage in DAMAGES.items():
        cases.add(f"trust/metadata/{file}", kind)
        scene.reset()
        damage(scene.box.metadata / file, scene.old_box / "trust" / "metadata" / file)
        scene.assert_protected()


@pytest.mark.parametrize("kind", ["zeroed", "deleted", "older again"])
def test_all_local_metadata_at_once(scene: Scene, cases: Cases, kind: str) -> None:
    cases.add("trust/metadata", kind)
    if kind == "zeroed":
        scene.box.forget_metadata()
    else:
        shutil.rmtree(scene.box.metadata)
    if kind == "older again":
        shutil.copytree(scene.old_box / "trust" / "metadata", scene.box.metadata, symlinks=True)
    scene.assert_protected()


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("kind", DAMAGES)
def test_one_copy_of_the_floor_and_all_metadata(scene: Scene, cases: Cases, copy: int, kind: str) -> None:
    cases.add(("trust/metadata.floor", "floor/metadata.floor")[copy], f"{kind}, all metadata zeroed")
    path = scene.box.copies[copy]
    DAMAGES[kind](path, scene.old_box / path.relative_to(scene.box.folder))
    scene.box.forget_metadata()
    scene.assert_protected()


@pytest.mark.parametrize("folder", ["trust", "floor"])
def test_a_whole_folder_is_gone(scene: Scene, cases: Cases, folder: str) -> None:
    cases.add(folder, "deleted")
    shutil.rmtree(scene.box.folder / folder)
    scene.assert_protected()


@pytest.mark.parametrize("kind", ["emptied", "zeroed", "bit flipped", "truncated"])
def test_both_copies_of_the_floor_leave_what_python_tuf_knows(scene: Scene, cases: Cases, kind: str) -> None:
    cases.add("both copies of the floor", kind)
    for path in scene.box.copies:
        DAMAGES[kind](path, path)
    assert len(scene.box.floor.problems) == 2
    scene.server.folder = scene.old
    scene.box.refused(Reason.TRUST_FAILED)
    scene.assert_follows()


# --- a registry, or somebody on the way ---


def _stranger(scene: Scene) -> None:
    other = TufRepository(scene.folder / "stranger")
    for _ in range(5):
        other.sign_root()
        other.sign()
    scene.server.folder = other.folder


def _strange_root(scene: Scene) -> None:
    """A next root that strangers signed, for a device that would follow it."""
    other = TufRepository(scene.folder / "strange-root")
    other.root.version = scene.repository.root.version
    other.sign_root()
    name = f"{other.root.version}.root.json"
    data = (other.folder / "metadata" / name).read_bytes()
    scene.server.instead[f"metadata/{name}"] = whole(data)


def _replay(*files: str) -> Callable[[Scene], None]:
    def serve(scene: Scene) -> None:
        for file in files:
            scene.server.instead[f"metadata/{file}"] = whole((scene.old / "metadata" / file).read_bytes())

    return serve


def _under_its_name(role: str) -> Callable[[Scene], None]:
    """What was signed before, under the name of what is signed now."""

    def serve(scene: Scene) -> None:
        now, before = _newest(scene.repository.folder, role), _newest(scene.old, role)
        scene.server.instead[f"metadata/{now.name}"] = whole(before.read_bytes())

    return serve


def _newest(folder: Path, role: str) -> Path:
    return max((folder / "metadata").glob(f"*.{role}.json"), key=lambda p: int(p.name.partition(".")[0]))


def _answer(role: str, answer: Answer) -> Callable[[Scene], None]:
    def serve(scene: Scene) -> None:
        file = "timestamp.json" if role == "timestamp" else _newest(scene.repository.folder, role).name
        scene.server.instead[f"metadata/{file}"] = answer

    return serve


def _version(role: str, by: int) -> Callable[[Scene], None]:
    """Another version in the text, the signature of before."""

    def serve(scene: Scene) -> None:
        folder = scene.repository.folder / "metadata"
        path = folder / "timestamp.json" if role == "timestamp" else _newest(scene.repository.folder, role)
        document = json.loads(path.read_text())
        document["signed"]["version"] += by
        scene.server.instead[f"metadata/{path.name}"] = whole(json.dumps(document).encode())

    return serve


ATTACKS: dict[str, tuple[Callable[[Scene], None], Reason]] = {
    "replayed timestamp": (_replay("timestamp.json"), Reason.TRUST_FAILED),
    "another registry's everything": (_stranger, Reason.TRUST_FAILED),
    "another registry's root": (_strange_root, Reason.TRUST_FAILED),
    **{
        f"{role} of before under the name of now": (_under_its_name(role), Reason.TRUST_FAILED)
        for role in ("snapshot", "targets", "team")
    },
    **{
        f"{role} {kind}": (_answer(role, answer), reason)
        for role in ("timestamp", "snapshot", "targets", "team")
        for kind, answer, reason in (
            ("without an end", endless(b"{"), Reason.TRUST_FAILED),
            ("of 6 MB", whole(b" " * (6 << 20)), Reason.TRUST_FAILED),
            ("is a login page", whole(b"<html>"), Reason.TRUST_FAILED),
            ("is empty", whole(b""), Reason.TRUST_FAILED),
            ("is cut", cut(b"x" * 400, 100), Reason.REGISTRY_UNREACHABLE),
            ("is gone", status(404), Reason.REGISTRY_UNREACHABLE),
            ("fails", status(503), Reason.REGISTRY_UNREACHABLE),
            ("hangs up", hang_up, Reason.REGISTRY_UNREACHABLE),
        )
    },
    **{
        f"{role} {by:+d} in the text": (_version(role, by), Reason.TRUST_FAILED)
        for role in ("timestamp", "snapshot", "targets", "team")
        for by in (-1, 1000)
    },
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_registry_may_do(scene: Scene, cases: Cases, attack: str) -> None:
    cases.add("registry", attack)
    serve, reason = ATTACKS[attack]
    serve(scene)
    scene.box.refused(reason, NAME)
    scene.assert_not_sunk()
    scene.server.instead.clear()
    scene.assert_protected()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "team", "root"])
def test_what_has_expired_is_waited_out(tmp_path: Path, cases: Cases, role: str) -> None:
    cases.add("registry", f"{role} has expired")
    scene = Scene(tmp_path)
    repository = scene.repository
    try:
        repository.lifetime_s[role] = DAY_S
        if role == "root":
            repository.sign_root()
        repository.sign()
        scene.box.clock_s += 2 * DAY_S
        scene.box.refused(Reason.TRUST_EXPIRED, NAME)
        scene.assert_not_sunk()
        repository.now_s += 2 * DAY_S
        if role == "root":
            repository.sign_root()
        repository.sign()
        scene.assert_follows()
    finally:
        scene.server.stop()


# --- kills and a disk that fails, in the real child, at each system call in turn ---

_INJECTED = {
    "kill -9 before": "signal=KILL",
    "EIO": "error=EIO",
    "ENOSPC": "error=ENOSPC",
}
_CALLS = {"rename": "rename,renameat,renameat2", "fsync": "fsync", "symlink": "symlink,symlinkat"}
_MOST_CALLS = 60


@pytest.mark.thorough
@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize("fault", _INJECTED)
def test_every_step_of_a_refresh_may_be_the_last(scene: Scene, cases: Cases, call: str, fault: str) -> None:
    """Each run is cut one call later than the one before, until one is not cut any more."""
    for count in range(1, _MOST_CALLS):
        scene.reset()
        scene.box.forget_metadata()
        ended = _refresh_under_strace(scene, _CALLS[call], f"{_INJECTED[fault]}:when={count}")
        if ended == 0:
            assert count > 1
            break
        cases.add(f"refresh: {call} {count}", fault)
        scene.assert_protected()
    else:
        raise AssertionError(f"more than {_MOST_CALLS} calls of {call}")


_REFRESH = """
import sys, time
from pathlib import Path
from edge_agent.config import Registry
from edge_agent.update.floor import Floor
from edge_agent.update.http import Client
from edge_agent.update.levels import MetadataFloor
from edge_agent.update.trust import Trust, source
folder, url, root = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
registry = Registry(url=url, root=root, retries=1)
copies = (folder / "trust" / "metadata.floor", folder / "floor" / "metadata.floor")
floor = Floor(copies, MetadataFloor())
trust = Trust(folder / "trust" / "metadata", source(registry, Client(registry)), floor, time.time())
trust.refresh()
trust.target("models/a")
"""


def _refresh_under_strace(scene: Scene, calls: str, inject: str) -> int:
    python = Path(sys.executable).resolve()  # the real interpreter, not a launcher
    inner = [str(python), "-c", _REFRESH, str(scene.box.folder), scene.server.url]
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}"]
    command += ["-e", f"inject={calls}:{inject}"]
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, *inner, str(scene.repository.root_path)],
        env=environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode
