"""A device's trust and nothing else of it: metadata, both copies of its floor, and a clock of its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_agent.config import Registry
from edge_agent.update.floor import Floor
from edge_agent.update.http import Client
from edge_agent.update.levels import MetadataFloor
from edge_agent.update.trust import Trust, source
from edge_contract.errors import EdgewardError, Reason, TransferFailed
from tests.support.http_registry import FolderServer


class TrustBox:
    """Each refresh is by another client, as each child of a device is another process."""

    def __init__(self, folder: Path, root: Path, server: FolderServer) -> None:
        self.folder = folder
        self.metadata = folder / "trust" / "metadata"
        self.copies = (folder / "trust" / "metadata.floor", folder / "floor" / "metadata.floor")
        self.clock_s = time.time()
        self._registry = Registry(url=server.url, root=str(root), timeout_s=2.0, retries=1)

    @property
    def floor(self) -> Floor[MetadataFloor]:
        return Floor(self.copies, MetadataFloor())

    def refresh(self, *targets: str) -> Trust:
        trust = Trust(self.metadata, source(self._registry, Client(self._registry)), self.floor, self.clock_s)
        trust.refresh()
        for name in targets:
            trust.target(name)
        return trust

    def refused(self, reason: Reason, *targets: str) -> EdgewardError:
        with pytest.raises(TransferFailed) as fault:
            self.refresh(*targets)
        assert fault.value.reason is reason, fault.value
        return fault.value

    def versions(self) -> dict[str, int]:
        return {role: level.version for role, level in self.floor.value.roles.items()}

    def forget_metadata(self) -> None:
        """Everything that python-tuf keeps, zeroed or gone."""
        for path in [*self.metadata.glob("*.json"), *self.metadata.glob("root_history/*")]:
            if not path.is_symlink():
                path.write_bytes(bytes(path.stat().st_size))
