"""Where a missing blob comes from: the seam between the plan of an update and the ways to get bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edge_agent.update.download import Downloader
from edge_contract.manifest import File, blob_path


class Source(Protocol):
    """One way, or several behind each other, to a blob."""

    def obtain(self, blob: File) -> Path:
        """The file with exactly the blob's content, synced, in the staging folder under its digest.

        Space for the whole of it is reserved in `SHA256.part` when this is called. What an attempt leaves
        under `SHA256.*` stays for the next one, and goes when the version is in the store. Raises
        TransferFailed, BlobMissing, BundleRejected or StorageFault.
        """


class FullBlobs:
    """The blob as it is."""

    def __init__(self, downloader: Downloader) -> None:
        self._downloader = downloader

    def obtain(self, blob: File) -> Path:
        return self._downloader.fetch(blob_path(blob.sha256), blob.sha256, blob.size_bytes)
