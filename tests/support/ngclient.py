"""python-tuf's own client on a registry's folder, as a device would use it, with its bytes counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater


class _Folder(FetcherInterface):
    def __init__(self, folder: Path, roots: Path) -> None:
        self._folder = folder
        self._roots = roots
        self.fetched: dict[str, int] = {}

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix("folder:")
        try:
            folder = self._roots if name.endswith(".root.json") else self._folder
            data = (folder / name).read_bytes()
        except FileNotFoundError as e:
            raise DownloadHTTPError(f"no file {name}", 404) from e
        self.fetched[name] = len(data)
        return iter([data])


class Client:
    """Keeps its metadata in a folder between calls, as a device does."""

    def __init__(self, registry: Path, state: Path, pinned: bytes) -> None:
        self.registry = registry
        self.state = state
        self.pinned = pinned
        self.fetched: dict[str, int] = {}
        state.mkdir(parents=True, exist_ok=True)

    def find(self, name: str, roots: Path | None = None) -> TargetFile | None:
        """Refresh, then look one target up. `fetched` says what that took: name → bytes.

        `roots` is an older copy of the registry, whose roots were fetched before it changed.
        """
        fetcher = _Folder(self.registry, roots or self.registry)
        self.fetched = fetcher.fetched
        updater = Updater(str(self.state), "folder:metadata/", fetcher=fetcher, bootstrap=self.pinned)
        updater.refresh()
        return updater.get_targetinfo(name)

    @property
    def fetched_bytes(self) -> int:
        """What the last call took."""
        return sum(self.fetched.values())
