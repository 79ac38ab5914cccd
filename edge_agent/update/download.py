"""Download of one blob: resumes, verifies as it goes, never leaves a wrong file under a right name.

It runs in the fetch child: http.py asks, answers.py says what an answer means, part.py keeps the bytes.
Which blobs are wanted is not decided here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from edge_agent import files
from edge_agent.config import Registry
from edge_agent.update.answers import BeginAnew, BlobMissing, Dialogue, Later, Next, Postponed, TooLong
from edge_agent.update.http import Client, Response, shown
from edge_agent.update.pacing import LONGEST_PAUSE_S, LowSpeed, Rate, backoff_s
from edge_agent.update.part import Part
from edge_agent.update.store import file_matches
from edge_contract.errors import Reason, TransferFailed
from edge_contract.manifest import File

__all__ = ["BlobMissing", "Downloader", "Postponed"]

_LOOK_EVERY_S = 1.0

# Called with what came, in bytes; negative, what was thrown away again.
Progress = Callable[[int], None]
# Called about once a second with the bytes that the blob still lacks; raises Postponed.
Gate = Callable[[int], None]


class _Arrived(Exception):
    """Somebody else has brought the blob meanwhile."""


class _Work:
    """One blob on its way."""

    def __init__(self, url: str, blob: File, part: Part, done: Path) -> None:
        self.url, self.blob, self.part, self.done = url, blob, part, done
        self.shown = shown(url)
        self.talk = Dialogue(self.shown, blob.sha256, blob.size_bytes)


class Downloader:
    """Fetches blobs of known size and digest from one registry into a staging folder.

    One for one transfer: `deadline_s` counts from the first blob on.
    """

    def __init__(
        self,
        registry: Registry,
        staging: Path,
        progress: Progress,
        *,
        client: Client | None = None,
        gate: Gate = lambda _: None,
    ) -> None:
        self._registry = registry
        self._staging = staging
        self._progress = progress
        self._client = client or Client(registry)
        self._gate = gate
        self._rate = Rate(registry.max_rate_bytes_per_s, time.monotonic())
        self._ends_s = float("inf")

    def fetch(self, path: str, sha256: str, size_bytes: int) -> Path:
        """The staged file with exactly that content, synced.

        Raises TransferFailed (Postponed when waiting here is of no use), BlobMissing, BundleRejected (the
        registry serves another content) or StorageFault. What has arrived stays.
        """
        if self._ends_s == float("inf"):
            self._ends_s = time.monotonic() + self._registry.deadline_s
        blob = File("model", sha256, size_bytes, sha256)
        done = self._staging / sha256
        if file_matches(done, blob):
            return done
        with Part(self._staging / f"{sha256}.part", size_bytes, self._progress) as part:
            work = _Work(f"{self._client.base}/{path}", blob, part, done)
            try:
                self._complete(work)
            except _Arrived:
                self._progress(size_bytes - part.length)
                files.remove_link(part.path)
                return done
            part.sync()
        files.move(part.path, done)
        return done

    def _complete(self, work: _Work) -> None:
        """Attempts, until the part is whole and right."""
        failures, furthest = 0, work.part.length
        while True:
            try:
                if self._attempt(work):
                    return
                continue
            except Postponed:
                raise
            except BeginAnew:
                failures, furthest, pause_s = 0, 0, random.uniform(0, backoff_s(1))  # noqa: S311
            except TransferFailed as e:
                self._check_deadline(work)  # it shuts connections, and that is no failure of the other end
                # A link that gets on, however often it is cut, is not given up.
                progress = work.part.length > furthest and not isinstance(e, TooLong)
                failures = 1 if progress else failures + 1
                furthest = max(furthest, work.part.length)
                if failures >= self._registry.retries:
                    raise
                pause_s = self._pause_s(failures, e)
            time.sleep(pause_s)
            self._look(work)

    def _attempt(self, work: _Work) -> bool:
        """Whether the part is whole and right now; False when another question will do better."""
        part = work.part
        begun = part.length
        if not part.whole:
            response = self._client.get(work.url, work.talk.headers(begun), self._ends_s)
            with self._client.reading(work.url, response):
                todo = work.talk.accept(response.status, response.headers, begun, time.time())
                if todo is Next.ASK_AGAIN:
                    response.close()
                    return False
                if todo is Next.BEGIN_ANEW:
                    part.restart()
                    begun = 0
                self._receive(work, response)
        if part.sha256 == work.blob.sha256:
            return True
        wrong = work.talk.wrong_content(part.sha256, in_one_piece=begun == 0)
        part.restart()
        raise wrong

    def _receive(self, work: _Work, response: Response) -> None:
        part = work.part
        looked_s = time.monotonic()
        speed = self._low_speed(looked_s)
        while chunk := self._client.read(work.url, response, self._ends_s):
            if part.length + len(chunk) > part.size_bytes:
                raise work.talk.too_long()
            part.append(chunk)
            pause_s = self._rate.pause_s(len(chunk), time.monotonic())
            if pause_s:
                time.sleep(pause_s)
            now_s = time.monotonic()
            if speed.too_slow(len(chunk), now_s):
                raise self._too_slow(work)
            if now_s - looked_s >= _LOOK_EVERY_S:
                looked_s = now_s
                self._look(work)
        if not part.whole:
            raise work.talk.ended_early(part.length)

    def _low_speed(self, now_s: float) -> LowSpeed:
        least = float(self._registry.low_speed_bytes_per_s)
        if self._registry.max_rate_bytes_per_s:  # our own brake is not the network's fault
            least = min(least, self._registry.max_rate_bytes_per_s / 2)
        return LowSpeed(least, self._registry.low_speed_s, now_s)

    def _too_slow(self, work: _Work) -> TransferFailed:
        bound = f"{self._registry.low_speed_bytes_per_s} bytes a second for {self._registry.low_speed_s:g} s"
        return TransferFailed(
            Reason.REGISTRY_UNREACHABLE,
            f"{work.shown} came slower than {bound}",
            "it goes on over a new connection; lower [registry] low_speed_bytes_per_s for such a link",
        )

    def _look(self, work: _Work) -> None:
        """Whether to go on: the deadline, the gate, and another process that may have brought the blob."""
        self._check_deadline(work)
        self._gate(work.part.size_bytes - work.part.length)
        if file_matches(work.done, work.blob):
            raise _Arrived

    def _check_deadline(self, work: _Work) -> None:
        part = work.part
        if time.monotonic() > self._ends_s:
            raise Postponed(
                Reason.DEADLINE_EXCEEDED,
                f"the transfer took longer than {self._registry.deadline_s:g} s; "
                f"{work.shown} has {part.length} of {part.size_bytes} bytes",
                "the next attempt goes on there; raise [registry] deadline_s for a slow link",
            )

    def _pause_s(self, failures: int, error: TransferFailed) -> float:
        pause_s = random.uniform(0, backoff_s(failures))  # noqa: S311 - full jitter
        asked_s = error.retry_after_s if isinstance(error, Later) else None
        if asked_s is None:
            return pause_s
        if asked_s > LONGEST_PAUSE_S:
            raise Postponed(error.reason, error.what, error.next_step, asked_s) from error
        return asked_s + pause_s
