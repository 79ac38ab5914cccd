"""Reading a registry's metadata: The Update Framework, through python-tuf's client as it stands.

Verification starts from a pinned root and works alike on a URL and on a folder. Signing is signing.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError

# python-tuf documents these names here without listing them in __all__.
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

from edge_contract.canonical import sha256_hex
from edge_contract.errors import BundleRejected, EdgewardError, InputRejected, Reason, TransferFailed
from fleet.registry import approvals, shelves
from fleet.registry.tree import Tree

_TIMEOUT_S = 10
_FOLDER = "folder:"


class Target(NamedTuple):
    """What signed metadata says of a file."""

    length: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Verified metadata of a registry, and a way to its blobs. Delegated roles are fetched when needed."""

    location: str
    revision: int
    _fixed: Mapping[str, datetime]
    _tree: Tree
    _download: Callable[[str, int], bytes]

    @property
    def first_to_expire(self) -> str:
        """Of the roles that all the rest hangs on and those that have been needed so far."""
        return min(self._expiries, key=lambda role: self._expiries[role])

    @property
    def expires(self) -> datetime:
        """When that is."""
        return self._expiries[self.first_to_expire]

    @property
    def _expiries(self) -> Mapping[str, datetime]:
        signed = {name: role.expires for name, role in self._tree.roles.items() if role.version}
        return {**self._fixed, **signed}

    @property
    def targets(self) -> Mapping[str, Target]:
        """Everything that is published, through all delegations. Raises TransferFailed, BundleRejected."""
        with self._judged():
            return plain(self._tree.every())

    @property
    def expired_teams(self) -> list[str]:
        """Teams whose metadata has expired, so that their versions are not among the targets."""
        return [shelves.team_of(role) or role for role in self._tree.expired]

    @property
    def refused_teams(self) -> Mapping[str, str]:
        """Teams that have signed what they may not, and what: their versions are not among the targets."""
        return {shelves.team_of(role) or role: why for role, why in self._tree.refused.items()}

    def find(self, name: str) -> Target | None:
        """What the metadata says of one target; fetches only the roles that lead to it."""
        with self._judged():
            found = self._tree.find(name)
            return None if found is None else plain_target(found)

    def custom(self, name: str) -> Mapping[str, Any]:
        """What its role says of a target beside length and digest."""
        with self._judged():
            found = self._tree.find(name)
            return dict(found.custom or {}) if found else {}

    def team_of(self, name: str) -> str | None:
        """The team whose role answers for a target, if it is one's."""
        return shelves.team_of(self._tree.shelf_of(name) or "")

    def policy_for(self, name: str) -> approvals.Policy:
        """The approvals that a target needs. Raises BundleRejected."""
        return approvals.policy_for(self._tree.top, self._tree.shelf_of(name))

    def blob(self, path: str, target: Target) -> bytes:
        """A blob's bytes, checked. Raises TransferFailed or BundleRejected."""
        try:
            data = self._download(path, target.length)
        except DownloadError as e:
            raise TransferFailed(
                Reason.BLOB_MISSING,
                f"{self.location}: {path} cannot be had: {e}",
                "publish the bundle again, or check the web server",
            ) from e
        if len(data) != target.length or sha256_hex(data) != target.sha256:
            raise BundleRejected(
                Reason.DIGEST_MISMATCH,
                f"{self.location}: {path} does not hold what its name says",
                "publish the bundle again, and look for who altered the file",
            )
        return data

    @contextmanager
    def _judged(self) -> Iterator[None]:
        try:
            yield
        except (DownloadError, RepositoryError, ValueError, KeyError) as e:
            raise fault(self.location, e) from e


def read(location: str, pinned: bytes) -> Catalogue:
    """Fetch and verify the newest metadata of a folder or URL, starting from the `pinned` root.

    Raises TransferFailed (unreachable, expired), BundleRejected (not signed as it must be) or
    InputRejected (the root is none, the folder holds no registry).
    """
    base, fetcher = _source(location)
    with TemporaryDirectory(prefix="edge-fleet-") as scratch:
        try:
            updater = Updater(scratch, f"{base}metadata/", fetcher=fetcher, bootstrap=pinned)
        except (RepositoryError, ValueError) as e:
            raise bad_root(e) from e
        try:
            updater.refresh()
            # The client has just verified and stored these.
            root = Metadata[Root].from_file(str(Path(scratch, "root.json"))).signed
            targets = Metadata[Targets].from_file(str(Path(scratch, "targets.json"))).signed
            snapshot = Metadata[Snapshot].from_file(str(Path(scratch, "snapshot.json"))).signed
            timestamp = Metadata[Timestamp].from_file(str(Path(scratch, "timestamp.json"))).signed
        except (DownloadError, RepositoryError) as e:
            raise fault(location, e) from e

    def get(name: str, limit_bytes: int) -> bytes:
        return fetcher.download_bytes(f"{base}metadata/{name}", limit_bytes)

    return Catalogue(
        location=location,
        revision=snapshot.version,
        _fixed={role.type: role.expires for role in (root, snapshot, timestamp)},
        _tree=Tree(targets, snapshot, get, datetime.now(UTC)),
        _download=lambda path, limit_bytes: fetcher.download_bytes(base + path, limit_bytes),
    )


def is_url(location: str) -> bool:
    """Whether a registry is named by URL, not by folder."""
    return location.startswith(("http://", "https://"))


def _source(location: str) -> tuple[str, FetcherInterface]:
    if is_url(location):
        # It warns of every retry; what came of them is said once, as an error.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        return location.rstrip("/") + "/", Urllib3Fetcher(socket_timeout=_TIMEOUT_S)
    if not Path(location, "metadata", "timestamp.json").is_file():
        raise no_registry(Path(location))
    return _FOLDER, _FolderFetcher(Path(location))


class _FolderFetcher(FetcherInterface):
    """A folder in place of a web server, so that both are verified by the same code."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            return iter([(self._folder / url.removeprefix(_FOLDER)).read_bytes()])
        except FileNotFoundError as e:
            raise DownloadHTTPError(f"no file {e.filename}", 404) from e


def plain(targets: Mapping[str, TargetFile]) -> dict[str, Target]:
    """Targets as plain values, by name."""
    return {name: plain_target(target) for name, target in targets.items()}


def plain_target(target: TargetFile) -> Target:
    """A target as a plain value."""
    return Target(target.length, target.hashes["sha256"])


def no_registry(folder: Path) -> InputRejected:
    """What is said of a folder without a registry in it."""
    return InputRejected(
        Reason.BAD_INPUT,
        f"{folder}: no registry here (metadata/timestamp.json is missing)",
        "make one with `edge-fleet registry init`, or name the folder or URL of one",
    )


def bad_root(error: Exception) -> InputRejected:
    """What is said of a pinned root that is none."""
    return InputRejected(
        Reason.TRUST_FAILED,
        f"the pinned root is not a valid TUF root: {error}",
        "take root.json from the registry's maker; do not take it from the network",
    )


def fault(location: str, error: Exception) -> EdgewardError:
    """python-tuf's exception as one of ours."""
    if isinstance(error, ExpiredMetadataError):
        return TransferFailed(
            Reason.TRUST_EXPIRED,
            f"{location}: the registry's metadata has expired: {error}",
            "run `edge-fleet registry refresh` where the keys are, and check this machine's clock",
        )
    if isinstance(error, DownloadHTTPError):
        return TransferFailed(
            Reason.REGISTRY_UNREACHABLE,
            f"{location}: no metadata of a registry here: {error}",
            "check the registry's URL, and that it serves the folder `metadata`",
        )
    if isinstance(error, DownloadError):
        return TransferFailed(
            Reason.REGISTRY_UNREACHABLE,
            f"{location}: the registry cannot be reached: {error.__cause__ or error}",
            "check the URL, the network and the web server",
        )
    return BundleRejected(
        Reason.TRUST_FAILED,
        f"{location}: the registry's metadata is not signed as the pinned root demands: {error}",
        "look for who altered it; restore the folder from a copy, or pin the right root",
    )
