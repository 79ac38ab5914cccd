"""A real registry made with `edge-fleet registry`, in this process for speed."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_contract.canonical import sha256_hex
from edge_contract.manifest import blob_path, target_name
from fleet.cli import main
from fleet.registry import files, refresh, repository, seen
from fleet.registry.keys import Keys
from fleet.registry.trust import Target
from tests.support.models import BundleOnDisk


class RegistryFolder:
    """`registry` and `keys` below a folder."""

    def __init__(self, folder: Path, password: str = "") -> None:
        self.folder = folder / "registry"
        self.keys = folder / "keys"
        self._password = password

    @classmethod
    def create(cls, folder: Path, *options: str) -> RegistryFolder:
        """An empty registry; `options` are those of `edge-fleet registry init`."""
        made = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        made.run("init", "--insecure-no-password", "--operator-label", "tests", *options)
        return made

    @property
    def root(self) -> Path:
        """What a device pins."""
        return self.keys / "root.json"

    @property
    def operator_key(self) -> Ed25519PrivateKey:
        """Signs desired states and commands."""
        return self.keyring.load("operator")

    def publish(self, bundle: BundleOnDisk, *delta_from: str) -> None:
        """Publish a bundle; without encodings of its blobs unless `delta_from` says what to make."""
        options = [word for version in delta_from or ("none",) for word in ("--delta-from", version)]
        self.run("publish", str(bundle.folder), *options)

    def refresh(self, *options: str) -> None:
        """Sign snapshot and timestamp anew."""
        self.run("refresh", *options)

    def publish_many(self, model: str, count: int) -> list[str]:
        """Versions 1 to `count` of a model in one signing, without blobs; returns their targets' names."""
        names = [target_name(model, str(n)) for n in range(1, count + 1)]
        with self.opened() as repo:
            for name in names:
                repo.draft.add(name, Target(len(name), sha256_hex(name.encode())))
            list(repository.sign(repo, self.keyring))
        return names

    def rotate(self, role: str, times: int = 1) -> None:
        """Replace a role's keys by as many new ones, so many times."""
        for _ in range(times):
            self.run("keys", "rotate", role, "--insecure-no-password")

    def delegate(self, pattern: str, team: str) -> None:
        """Give models to a team; its key lies among the others."""
        self.run("delegate", pattern, "--team", team, "--insecure-no-password")

    def revoke(self, reference: str) -> None:
        """Take MODEL@VERSION back."""
        self.run("revoke", reference)

    def rotate_root(self, times: int = 1) -> None:
        """Replace the root keys; each time the root's version rises by one."""
        self.rotate("root", times)

    def states_while(self, *command: str) -> list[Path]:
        """Copies of the folder after each file that a command writes into it: what readers may meet."""
        states: list[Path] = []
        write = files.write

        def watched(path: Path, data: bytes, *, mode: int = 0o644) -> None:
            write(path, data, mode=mode)
            if path.is_relative_to(self.folder):
                states.append(self.folder.with_name(f"state-{uuid.uuid4().hex}"))
                shutil.copytree(self.folder, states[-1])
                shutil.copy(self.keys / seen.NAME, _noted(states[-1]))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "write", watched)
            self.run(*command)
        return states

    def put_back(self, state: Path) -> None:
        """As it was after one of those writes: the folder, and what of it was noted beside the keys."""
        shutil.rmtree(self.folder)
        shutil.copytree(state, self.folder)
        shutil.copy(_noted(state), self.keys / seen.NAME)

    @property
    def keyring(self) -> Keys:
        """All keys. Those of `create` have no password."""
        return Keys(self.keys, self._password.encode)

    def opened(self) -> AbstractContextManager[repository.Repository]:
        """The registry, to be changed by hand."""
        return repository.opened(self.folder, self.keyring)

    def sign_at(self, when: datetime, *also: str) -> None:
        """Sign snapshot, timestamp and `also` (`targets`, `root`, teams) as if it were another time.

        A year ago makes a registry that has expired; its timestamp says when that was.
        """
        with self.opened() as repo:
            repo.now = lambda: when
            refresh.refresh(repo, self.keyring, also, repo.draft.periods, None)

    def export(self, output: Path, *bundles: BundleOnDisk, options: Sequence[str] = ()) -> Path:
        """Write bundles to a medium; returns it."""
        labels = [f"{b.manifest.name}@{b.manifest.version}" for b in bundles]
        self.run("export", *labels, "-o", str(output), *options)
        return output

    def blob(self, bundle: BundleOnDisk, role: str = "model") -> Path:
        """Where the registry keeps the content of a bundle's file; with role `manifest`, the manifest."""
        digests = {f.role: f.sha256 for f in bundle.manifest.files} | {"manifest": bundle.digest}
        return self.folder / blob_path(digests[role])

    def copy(self, folder: Path) -> RegistryFolder:
        """A copy to be tampered with; the keys stay the same."""
        other = RegistryFolder(folder)
        shutil.copytree(self.folder, other.folder)
        shutil.copytree(self.keys, other.keys)
        return other

    def run(self, *command: str) -> Any:
        """A command of `edge-fleet registry` on this folder; returns what it printed."""
        words = 2 if command[0] == "keys" else 1
        args = ["registry", *command[:words], str(self.folder), *command[words:]]
        args += ["--keys", str(self.keys), "--json"]
        result = CliRunner().invoke(main, args, env={"EDGEWARD_KEY_PASSWORD": None})
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


def _noted(state: Path) -> Path:
    return state.with_name(f"{state.name}.{seen.NAME}")


def tamper(path: Path) -> None:
    """Change one bit in the middle of a file, keeping its length."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
