"""Trust: The Update Framework, through python-tuf's client. The agent's only file that imports tuf.

It runs in the short-lived fetch child, never in the control process. Only `refresh()` and
`get_targetinfo()` are used: bytes are fetched by download.py, which resumes and syncs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    RepositoryError,
)
from tuf.ngclient.updater import Updater
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher
from urllib3.exceptions import HTTPError

from edge_agent import files
from edge_agent.config import Registry
from edge_contract.console import os_fault
from edge_contract.errors import DeviceUnfit, EdgewardError, Reason, TransferFailed

# tuf wraps what its fetcher raises at the start of a body, not in the middle of it: hence HTTPError.
_FAULTS = (DownloadError, RepositoryError, HTTPError, OSError)


class Target(NamedTuple):
    """What signed metadata says of a target."""

    length: int
    sha256: str


class Trust:
    """Refreshed metadata. Construct, `refresh()`, then look targets up."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self._folder = folder / "metadata"
        self._url = registry.url.rstrip("/")
        files.make_folder(self._folder)
        try:
            self._updater = Updater(
                metadata_dir=str(self._folder),
                metadata_base_url=f"{self._url}/metadata/",
                fetcher=Urllib3Fetcher(socket_timeout=math.ceil(registry.timeout_s)),
                bootstrap=_pinned_root(Path(registry.root)),
            )
        except OSError as e:
            raise os_fault(e) from e
        except (RepositoryError, ValueError) as e:
            raise DeviceUnfit(
                Reason.TRUST_FAILED,
                f"the pinned root {registry.root} is not a valid TUF root: {e}",
                "copy root.json of the registry to the device again",
            ) from e

    def refresh(self) -> None:
        """Fetch and verify the newest metadata and make it durable.

        Raises TransferFailed (unreachable, expired, not signed as it must be) or StorageFault.
        """
        try:
            self._updater.refresh()
        except _FAULTS as e:
            raise self._fault(e) from e
        for path in self._folder.iterdir():
            if path.is_file() and not path.is_symlink():
                files.sync_file(path)
        files.sync_folder(self._folder)

    def target(self, name: str) -> Target | None:
        """What the metadata says of `name`, or None when it is not published."""
        try:
            info = self._updater.get_targetinfo(name)
        except _FAULTS as e:
            raise self._fault(e) from e
        return None if info is None else Target(info.length, info.hashes["sha256"])

    def _fault(self, error: Exception) -> EdgewardError:
        if isinstance(error, ExpiredMetadataError):
            return TransferFailed(
                Reason.TRUST_EXPIRED,
                f"metadata of {self._url} has expired: {error}",
                "run `edge-fleet registry refresh`, and check this device's clock",
            )
        if isinstance(error, DownloadHTTPError):
            return TransferFailed(
                Reason.REGISTRY_UNREACHABLE,
                f"registry {self._url} answered {error.status_code} for its metadata",
                "check the registry's URL and that it serves the folder `metadata`",
            )
        if isinstance(error, OSError):  # the network's are wrapped, so this is the disk's
            return os_fault(error)
        if isinstance(error, RepositoryError | DownloadLengthMismatchError):
            # Says nothing about any bundle, and may pass: a proxy's login page looks like this, too.
            return TransferFailed(
                Reason.TRUST_FAILED,
                f"metadata of {self._url} is not signed as it must be: {error}",
                "publish anew with the keys that the pinned root names; look for who altered it",
            )
        return TransferFailed(
            Reason.REGISTRY_UNREACHABLE,
            f"registry {self._url} cannot be reached: {error}",
            "check the network and the registry; the device tries again by itself",
        )


def _pinned_root(path: Path) -> bytes:
    data = files.read(path)
    if data is None:
        raise DeviceUnfit(
            Reason.TRUST_FAILED,
            f"the pinned root {path} is missing",
            "copy root.json of the registry to the device and name it in [registry] root",
        )
    return data
