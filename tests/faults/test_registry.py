"""The operator's side: each durable step of each command that signs is killed, or its disk fails.

Afterwards python-tuf's own client finds what it found before or what it should find now, never an error,
from the root that it was born with; and the same command again ends well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from tuf.api.metadata import Metadata, Root

from edge_contract.errors import StorageFault
from fleet.cli import main
from tests.faults.conftest import Cases
from tests.support import kill_points
from tests.support.ngclient import Client
from tests.support.registry_folder import RegistryFolder
from tests.unit.fleet import samples

NEXT = "models/fashion/next.json"
OLD = "models/fashion/1.json"


class Command(NamedTuple):
    """What is run, on a registry with so many versions, and how it may end when it is run again."""

    words: tuple[str, ...]
    versions: int = 1
    again: tuple[int, ...] = (0,)
    gone: str = ""


_KEYS = ("--keys", "{keys}")
_NEW = (*_KEYS, "--insecure-no-password")
COMMANDS = {
    "publish": Command(("registry", "publish", "{registry}", "{here}/next", *_KEYS)),
    "publish into bins": Command(("registry", "publish", "{registry}", "{here}/next", *_KEYS), versions=64),
    "refresh": Command(
        ("registry", "refresh", "{registry}", "--also", "root", "--also", "targets", *_KEYS), versions=65
    ),
    "rotate root": Command(("registry", "keys", "rotate", "{registry}", "root", *_NEW)),
    "rotate targets": Command(("registry", "keys", "rotate", "{registry}", "targets", *_NEW), versions=65),
    "rotate snapshot": Command(("registry", "keys", "rotate", "{registry}", "snapshot", *_NEW)),
    "rotate timestamp": Command(("registry", "keys", "rotate", "{registry}", "timestamp", *_NEW)),
    "rotate operator": Command(("registry", "keys", "rotate", "{registry}", "operator", *_NEW)),
    "delegate": Command(
        ("registry", "delegate", "{registry}", "fashion", "--team", "vision", *_NEW), versions=65
    ),
    # Done already is a refusal in one line, not a failure.
    "revoke": Command(("registry", "revoke", "{registry}", "fashion@1", *_KEYS), again=(0, 2), gone=OLD),
}
QUICK = ("publish", "rotate timestamp")


def _cases() -> Iterator[object]:
    for name in COMMANDS:
        for fault in kill_points.FAULTS:
            quick = name in QUICK and fault.startswith("kill")
            yield pytest.param(name, fault, marks=() if quick else pytest.mark.thorough, id=f"{name}-{fault}")


@pytest.mark.parametrize(("name", "fault"), list(_cases()))
def test_a_registry_survives(name: str, fault: str, tmp_path: Path, cases: Cases) -> None:
    command = COMMANDS[name]
    made = RegistryFolder.create(tmp_path / "made")
    publish_real(made, tmp_path, command.versions)
    samples.bundle(tmp_path / "made" / "next", version="next", release=1000)
    pinned = made.root.read_bytes()
    ends = broken(made, fault, command)
    assert len(ends) > 2
    for end in ends:
        cases.add(f"{name}: {end['point']}", fault)
        folder = Path(str(end["folder"]))
        if fault.startswith("kill"):
            assert end["code"] == -9, end
        else:
            # That an old key is not set aside is a warning; the new ones are good.
            aside = str(end["point"]).startswith("rename ")
            assert end["code"] == (0 if aside else StorageFault.exit_code), end
            told = [
                line for line in (folder / "stderr").read_text().splitlines() if not line.startswith("  ")
            ]
            assert len(told) == 1, told
        check(folder, pinned, command)
        again(folder, command)
        check(folder, pinned, command, finished=True)
        assert all(len(role.keyids) == 1 for role in root(folder).roles.values()), end


def root(folder: Path) -> Root:
    return Metadata[Root].from_file(str(folder / "registry" / "root.json")).signed


def publish_real(made: RegistryFolder, tmp_path: Path, versions: int) -> None:
    """Version 1 with its manifest and blobs, and beside it as many as are wanted of another model."""
    samples.bundle(tmp_path / "first", version="1", release=1)
    made.run("publish", str(tmp_path / "first"))
    if versions > 1:
        made.publish_many("digits", versions - 1)


def broken(made: RegistryFolder, fault: str, command: Command) -> list[dict[str, object]]:
    line = [sys.executable, "-m", "tests.support.kill_points", str(made.folder.parent), fault, *command.words]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        line,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in done.stdout.splitlines()]


def again(folder: Path, command: Command) -> None:
    places = {"registry": folder / "registry", "keys": folder / "keys", "here": folder}
    result = CliRunner().invoke(main, [word.format(**places) for word in command.words])
    assert result.exit_code in command.again, result.output


def check(folder: Path, pinned: bytes, command: Command, *, finished: bool = False) -> None:
    device = Client(folder / "registry", folder / f"device-{finished}", pinned)
    assert device.find("operators.json") is not None
    if command.gone != OLD:
        assert device.find(OLD) is not None
    elif finished:
        assert device.find(OLD) is None
    new = device.find(NEXT)
    if finished and "publish" in command.words:
        assert new is not None
    if new is not None:
        blob = folder / "registry" / f"blobs/sha256/{new.hashes['sha256'][:2]}/{new.hashes['sha256']}"
        new.verify_length_and_hashes(blob.read_bytes())
