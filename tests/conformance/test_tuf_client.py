"""The client for the conformance suite, started as the suite starts it, so that it does not rot.

The suite itself is not here; README.md says how to run it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_contract.canonical import sha256_hex
from tests.support.http_registry import FolderServer
from tests.support.registry_folder import tamper
from tests.support.tuf_repository import TufRepository

CLIENT = Path(__file__).with_name("tuf_client.py")
NAME, DATA = "folder/file with space.txt", b"what a target holds"


class Client:
    """The suite's view of a client: two folders and exit codes."""

    def __init__(self, folder: Path, url: str) -> None:
        self.metadata, self.targets = folder / "metadata", folder / "targets"
        for made in (self.metadata, self.targets):
            made.mkdir(parents=True)
        self._url = url

    def run(self, *arguments: str) -> int:
        command = [sys.executable, str(CLIENT), "--metadata-dir", str(self.metadata), *arguments]
        return subprocess.run(command, timeout=60, check=False).returncode

    def refresh(self) -> int:
        return self.run("--metadata-url", f"{self._url}/metadata", "refresh")

    def download(self, *names: str) -> int:
        where = ["--metadata-url", f"{self._url}/metadata", "--target-base-url", f"{self._url}/targets"]
        named = [argument for name in names for argument in ("--target-name", name)]
        return self.run(*where, *named, "--target-dir", str(self.targets), "download")

    def roles(self) -> set[str]:
        return {path.stem for path in self.metadata.glob("*.json")}


@pytest.fixture
def repository(tmp_path: Path) -> TufRepository:
    made = TufRepository(tmp_path / "registry")
    made.add(NAME, DATA)
    made.sign()
    path = target(made)
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    return made


def target(repository: TufRepository) -> Path:
    folder, _, file = NAME.rpartition("/")
    return repository.folder / "targets" / folder / f"{sha256_hex(DATA)}.{file.replace(' ', '%20')}"


@pytest.fixture
def server(repository: TufRepository) -> Iterator[FolderServer]:
    with FolderServer(repository.folder) as server:
        yield server


@pytest.fixture
def client(tmp_path: Path, server: FolderServer, repository: TufRepository) -> Client:
    made = Client(tmp_path / "client", server.url)
    assert made.run("init", str(repository.root_path)) == 0
    assert made.roles() == {"root"}
    return made


def test_what_is_signed_is_refreshed_downloaded_and_kept(client: Client, server: FolderServer) -> None:
    assert client.refresh() == 0
    assert client.roles() == {"root", "timestamp", "snapshot", "targets"}
    assert client.download(NAME) == 0
    assert [path.read_bytes() for path in client.targets.iterdir()] == [DATA]
    server.seen.clear()
    assert client.download(NAME) == 0
    assert [seen.path for seen in server.seen if "targets/" in seen.path] == []
    assert client.download(NAME, "none") == 1


def test_older_metadata_and_other_bytes_are_refused(
    client: Client, server: FolderServer, repository: TufRepository, tmp_path: Path
) -> None:
    old = repository.copy_files(tmp_path / "old")
    tamper(target(repository))
    repository.rotate("root", count=3, threshold=2)
    repository.sign()
    assert client.download(NAME) == 1
    assert list(client.targets.iterdir()) == []
    server.folder = old
    for path in client.metadata.glob("*.json"):
        if path.stem != "root":
            path.unlink()
    assert client.refresh() == 1
