"""Trust: The Update Framework, through python-tuf's client. The agent's only file that imports tuf.

It runs in the short-lived fetch child, never in the control process. Only `refresh()` and
`get_targetinfo()` are used: bytes are fetched by download.py, which resumes and syncs. Beside python-tuf's
own checks stand a floor of versions and a time that survive the loss of its files (levels.py, floor.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar, cast
from urllib.parse import quote

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root, Signed, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from edge_agent import files
from edge_agent.config import Registry
from edge_agent.update import levels, metadata_fetch, metadata_folder
from edge_agent.update.floor import Floor
from edge_agent.update.http import Client, HttpStatus, Streams
from edge_agent.update.levels import Holders, MetadataFloor, Seen
from edge_contract import wire
from edge_contract.console import os_fault
from edge_contract.errors import DeviceUnfit, EdgewardError, Reason, TransferFailed

_FAULTS = (DownloadError, RepositoryError, TransferFailed, OSError)
_TIMESTAMP = "timestamp.json"
_LAST_S = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
T = TypeVar("T")


class Source(NamedTuple):
    """Where metadata is fetched, and how; the configuration names the root that it must follow from."""

    registry: Registry
    client: Streams
    metadata_url: str


def source(registry: Registry, client: Client) -> Source:
    """The source that a configuration names."""
    return Source(registry, client, f"{client.base}/metadata/")


def local_source(registry: Registry, folder: Path) -> Source:
    """What this device has verified before, in place of a registry: python-tuf's own files in `folder`."""
    return Source(registry, _Own(folder), "own/")


class _Own:
    """The timestamp of before is the newest there is; the rest python-tuf finds by itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def stream(self, url: str) -> Iterator[bytes]:
        data = files.read(self._folder / _TIMESTAMP) if url.endswith(f"/{_TIMESTAMP}") else None
        if data is None:
            raise HttpStatus(url, 404)
        yield data


class _Fetcher(FetcherInterface):
    """python-tuf's way to the network is ours: its own uses the temporary folder and other proxies' rules."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._ends_s = time.monotonic() + source.registry.deadline_s

    def download_bytes(self, url: str, max_length: int) -> bytes:
        try:
            source = self._source
            return metadata_fetch.fetch(source.client, source.registry, url, max_length, self._ends_s)
        except HttpStatus as e:
            raise DownloadHTTPError(e.what, e.status) from e
        except metadata_fetch.TooLong as e:
            raise DownloadLengthMismatchError(str(e)) from e

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._source.client.stream(url)


class Target(NamedTuple):
    """What signed metadata says of a target."""

    length: int
    sha256: str


class Trust:
    """Refreshed metadata. Construct, `refresh()`, then look targets up."""

    def __init__(self, folder: Path, source: Source, floor: Floor[MetadataFloor], clock_s: float) -> None:
        """`folder` holds python-tuf's files; `clock_s` is this device's clock, read once, Unix seconds."""
        self._folder = folder
        self._source = source
        self._floor = floor
        self._clock_s = clock_s
        floor.repair()
        metadata_folder.tidy(folder)
        self._updater = self._open()

    def refresh(self) -> None:
        """Fetch and verify the newest metadata and make it and its floor durable.

        Raises TransferFailed (unreachable, expired, not signed as it must be, older than what was seen
        before), DeviceUnfit (the pinned root) or StorageFault.
        """
        try:
            self._call(self._updater.refresh)
        except TransferFailed as e:
            if e.reason is not Reason.TRUST_EXPIRED or not self._time_is_void():
                raise
            self._floor.raise_to(levels.with_time(self._floor.value, None))
            self._updater = self._open()
            self._call(self._updater.refresh)

    def hashes(self, name: str) -> tuple[int, Mapping[str, str]] | None:
        """Length and digests of the target `name`, or None when it is not published."""
        info = self._call(lambda: self._updater.get_targetinfo(name))
        return None if info is None else (info.length, info.hashes)

    def target(self, name: str) -> Target | None:
        """What the metadata says of `name`, or None when it is not published."""
        found = self.hashes(name)
        if found is None:
            return None
        length, hashes = found
        if "sha256" not in hashes:
            raise TransferFailed(
                Reason.TRUST_FAILED,
                f"metadata of {self._source.metadata_url} gives no SHA-256 of {name}",
                "publish it with `edge-fleet registry publish`",
            )
        return Target(length, hashes["sha256"])

    def _open(self) -> Updater:
        path = Path(self._source.registry.root)
        pinned = metadata_folder.pinned_root(path)
        try:
            updater = Updater(
                metadata_dir=str(self._folder),
                metadata_base_url=self._source.metadata_url,
                fetcher=_Fetcher(self._source),
                bootstrap=pinned,
            )
        except OSError as e:
            raise os_fault(e) from e
        except (RepositoryError, ValueError) as e:
            raise DeviceUnfit(
                Reason.TRUST_FAILED,
                f"the pinned root {path} is not a valid TUF root: {e}",
                "copy root.json of the registry to the device again",
            ) from e
        _set_time(updater, levels.now_s(self._clock_s, self._floor.value))
        return updater

    def _call(self, work: Callable[[], T]) -> T:
        """One call of python-tuf. What it verified, even if it then failed, is held against the floor."""
        try:
            result = work()
        except _FAULTS as e:
            with suppress(EdgewardError, *_FAULTS):
                self._keep(_seen(self._updater, self._folder), whole=False)
            raise self._fault(e) from e
        seen = _seen(self._updater, self._folder)
        below = levels.judge(self._floor.value, seen)
        if below is not None:
            raise self._older(below)
        self._check_expiry(seen)
        self._keep(seen, whole=True)
        metadata_folder.sync(self._folder)
        return result

    def _check_expiry(self, seen: list[Seen]) -> None:
        """Once more, for the timestamp may have told a later time than this device knew.

        A time at which its own set would be expired is refused, and not kept: it could not be lowered again.
        """
        told = levels.raised(self._floor.value, seen)
        now = _set_time(self._updater, levels.now_s(self._clock_s, told))
        for role, signed in _verified(self._updater).items():
            if signed.is_expired(now):
                self._keep(seen, whole=False)
                raise self._expired(f"{role}.json is expired, by the time that timestamp.json tells")

    def _keep(self, seen: list[Seen], *, whole: bool) -> None:
        """Make the floor durable. The registry's time is taken from a whole set only."""
        told = levels.raised(self._floor.value, seen)
        self._floor.raise_to(told if whole else levels.with_time(told, self._floor.value.time))

    def _time_is_void(self) -> bool:
        """Whether the keys that vouched for the floor's time have been rotated away since."""
        time = self._floor.value.time
        return time is not None and not levels.stands(time.signers, [_timestamp_holders(self._updater)])

    def _fault(self, error: Exception) -> EdgewardError:
        url = self._source.metadata_url
        if isinstance(error, ExpiredMetadataError):
            return self._expired(str(error))
        if isinstance(error, TransferFailed):
            return error
        if isinstance(error, DownloadHTTPError):
            return TransferFailed(
                Reason.REGISTRY_UNREACHABLE,
                f"registry {url} answered {error.status_code} for its metadata",
                "check the registry's URL and that it serves the folder `metadata`",
            )
        if isinstance(error, OSError):  # the network's are wrapped, so this is the disk's
            return os_fault(error)
        # Says nothing about any bundle, and may pass: a proxy's login page looks like this, too.
        return TransferFailed(
            Reason.TRUST_FAILED,
            f"metadata of {url} is not signed as it must be: {error}",
            "publish anew with the keys that the pinned root names; look for who altered it",
        )

    def _expired(self, what: str) -> TransferFailed:
        at_s = self._floor.value.at_s
        signed = f", the newest signature of the registry is of {_date(at_s)}" if at_s else ""
        return TransferFailed(
            Reason.TRUST_EXPIRED,
            f"metadata of {self._source.metadata_url} has expired: {what}; "
            f"this device's clock says {_date(self._clock_s)}{signed}",
            "check this device's clock; if it is right, run `edge-fleet registry refresh`",
        )

    def _older(self, below: levels.Below) -> TransferFailed:
        moved = f"; for a device that moved to another registry, remove {self._folder.parent} and its floor"
        return TransferFailed(
            Reason.TRUST_FAILED,
            f"registry {self._source.metadata_url} serves version {below.version} of {below.role}.json, "
            f"this device has verified version {below.floor} before",
            "look for who replays old metadata; after a restore from a backup, sign newer versions"
            + (moved if below.role == levels.ROOT else ""),
        )


# python-tuf offers neither the time it decides by nor what it has verified. These four functions are all
# that reach into it; tests/unit/edge_agent/update/test_trust_seam.py holds them against the pinned version.


def _set_time(updater: Updater, now_s: float) -> datetime:
    """Decide on expiry by this time instead of the local clock."""
    now = datetime.fromtimestamp(min(now_s, _LAST_S), UTC)
    updater._trusted_set.reference_time = now
    return now


def _verified(updater: Updater) -> dict[str, Signed]:
    """Every role that was verified, by name."""
    trusted = updater._trusted_set
    return {role: trusted[role] for _, role in sorted(trusted._trusted_delegations)}


def _timestamp_holders(updater: Updater) -> Holders:
    return _holders(updater._trusted_set.root, levels.TIMESTAMP)


def _seen(updater: Updater, folder: Path) -> list[Seen]:
    """What was verified, with who signed it and who may."""
    trusted = updater._trusted_set
    found = []
    for role, signed in _verified(updater).items():
        # Of a role that several roles delegate to, each of them may vouch.
        names = sorted(name for name, delegate in trusted._trusted_delegations if delegate == role)
        delegators = [cast("Root | Targets", trusted[name]) for name in names]
        holders = tuple(_holders(delegator, role) for delegator in delegators)
        signers = _signers(folder, role, signed.version, delegators) or frozenset().union(
            *(holder.keyids for holder in holders)
        )
        signed_at_s = _signed_at_s(signed) if isinstance(signed, Timestamp) else None
        found.append(Seen(role, signed.version, signers, holders, signed_at_s))
    return found


def _holders(delegator: Root | Targets, role: str) -> Holders:
    named = delegator.get_delegated_role(role)
    return Holders(frozenset(named.keyids), named.threshold)


def _signers(folder: Path, role: str, version: int, delegators: list[Root | Targets]) -> frozenset[str]:
    """Whose signatures on the local file are valid; none when the file is not what was verified."""
    try:
        document = Metadata[Targets].from_bytes((folder / f"{quote(role, '')}.json").read_bytes())
    except (OSError, RepositoryError):
        return frozenset()
    if document.signed.version != version:
        return frozenset()
    results = [
        d.get_verification_result(role, document.signed_bytes, document.signatures) for d in delegators
    ]
    return frozenset(keyid for result in results for keyid in result.signed)


def _signed_at_s(timestamp: Timestamp) -> int | None:
    """When the registry says it signed this; None from a registry that does not say, or says nonsense."""
    at_s = timestamp.unrecognized_fields.get(wire.SIGNED_AT)
    if type(at_s) is int and 0 < at_s <= timestamp.expires.timestamp():
        return at_s
    return None


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(min(seconds, _LAST_S), UTC).strftime("%Y-%m-%d %H:%M UTC")
