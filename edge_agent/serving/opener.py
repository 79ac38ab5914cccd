"""Opens versions, one at a time in a thread of its own, and counts the starts that none survived.

Which version is opened when is decided in models.py, what opening comes to in loader.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterable
from typing import NamedTuple

from edge_agent.config import Serving
from edge_agent.layout import Layout
from edge_agent.serving import deadman, heap
from edge_agent.serving.loader import Opened, open_version
from edge_agent.serving.starts import Starts
from edge_agent.serving.version import Version
from edge_contract.errors import DeviceUnfit, EdgewardError, Reason

_RETRY_S, _RETRY_MAX_S = 2.0, 600.0
# Doublings beyond this are over the cap.
_MOST_DOUBLINGS = 12


class Note(NamedTuple):
    """Why a model does not serve what the disk names."""

    reason: Reason
    detail: str


class Opener:
    """Owned by the event loop; its one thread may be in a load, which cannot be interrupted."""

    def __init__(self, layout: Layout, config: Serving) -> None:
        self._layout, self._config = layout, config
        self._starts = Starts(layout.starts, layout.spare_starts)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "loader")
        self._loading = False

    @property
    def busy(self) -> bool:
        """Whether the thread is in a load."""
        return self._loading

    async def open(self, name: str, digest: str, *, original: bool = False) -> Opened:
        """A version in memory; with `original` the model of the bundle even if there is a prepared form.

        Raises what loader.open_version does, a MemoryError as DeviceUnfit.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._open_now, name, digest, original)

    async def start(self, name: str, digest: str) -> Opened | Note:
        """The same, counted: should this process not survive it, the next one knows.

        What was not survived may have been the prepared form's doing (a bad sector under a mapped file is the
        end of the process), so from then on it is the original that is tried.
        """
        failed = self._starts.failed(name, digest)
        self._starts.begin(name, digest)
        try:
            opened = await self.open(name, digest, original=failed > 0)
        except EdgewardError as e:
            self.survived(name, digest)
            return Note(e.reason, e.what)
        except asyncio.CancelledError:
            self._starts.abandoned(name, digest)
            raise
        self.survived(name, digest)
        return opened

    def survived(self, name: str, digest: str) -> None:
        """It has loaded: its failed starts are forgotten."""
        self._starts.survived(name, digest)

    def struck_out(self, name: str, digest: str) -> Note | None:
        """Why a version is not tried while there is another; None when it may be."""
        failed = self._starts.failed(name, digest)
        if failed < self._config.max_failed_starts:
            return None
        return Note(Reason.FAILED_STARTS, f"the process did not survive {failed} starts with it")

    def pause_s(self, name: str, digests: Iterable[str], tries: int) -> float:
        """How long a model that does not serve waits after `tries` tries of this process.

        It grows with these, and with what earlier processes did not survive: power may have failed, then it
        is well; or the version ends the process, then the other models are to have some time in between.
        """
        most = max((self._starts.failed(name, digest) for digest in digests), default=0)
        doublings = tries + max(0, most - self._config.max_failed_starts)
        return float(min(_RETRY_MAX_S, _RETRY_S * 2 ** min(doublings, _MOST_DOUBLINGS)))

    async def let_go(self, old: Version) -> None:
        """Close a version that has no more requests."""
        await asyncio.get_running_loop().run_in_executor(self._thread, _let_go, old)

    def close(self) -> None:
        """Open nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _open_now(self, name: str, digest: str, original: bool) -> Opened:
        """In the thread. A load that hangs cannot be interrupted, so it ends the process.

        At a start, that is one that the version did not survive.
        """
        self._loading = True
        try:
            with deadman.loading(self._config.load_timeout_s):
                return open_version(self._layout, name, digest, original=original)
        except MemoryError as e:
            raise DeviceUnfit(
                Reason.MEMORY_TOO_SMALL,
                f"{name} {digest[:12]} does not fit into memory beside what runs",
                "deploy a smaller version, or serve fewer models on this device",
            ) from e
        finally:
            self._loading = False


def _let_go(old: Version) -> None:
    old.model.close()
    heap.give_back()
