"""The outbox: telemetry and events wait here, on disk, until the controller says it has stored them.

A PUBACK is not a store, so a row is deleted only on the application's acknowledgement. What does not fit
is evicted, oldest of the lowest priority first, and its numbers are told to the controller: loss is
reported, never silent. What is put or acknowledged in one turn of the control loop is one transaction
(`flush`); it is synced to the disk when an event is in it. When the disk cannot be used, rows are kept in
memory, bounded, and sent from there; they move to the disk once it recovers.

All times are monotonic milliseconds: steps of the wall clock neither expire nor delay a row. A row waits
for so much *running* time of the device; time switched off does not count.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from edge_agent import files
from edge_agent.messaging.box import Box, Damaged, Put, Row
from edge_agent.messaging.results import Result, Results
from edge_contract import canonical, wire
from edge_contract.errors import Reason, StorageFault

log = logging.getLogger("edge_agent.outbox")

__all__ = ["MEMORY_BYTES", "Outbox", "Row"]

# What waits in memory while the disk cannot be used.
MEMORY_BYTES = 1 << 20
_RETRY_FIRST_MS, _RETRY_MAX_MS = 1_000, 60_000
_EXPIRE_EVERY_MS = 60_000
# A turn of the loop that puts more than this is flushed in between.
_PENDING_BYTES = 256 << 10


class Outbox:
    """Rows in order of arrival. `flush` makes durable what was put; until then only this object knows it.

    No method raises for a faulty disk: `news` says what happened.
    """

    def __init__(self, path: Path, *, max_bytes: int, now_ms: int, stamp_ms: int) -> None:
        """`stamp_ms` names a damaged file that is set aside; it is no time to reckon with."""
        self._path = path
        self._max_bytes = max_bytes
        self._stamp_ms = stamp_ms
        self._began_ms = now_ms
        self._run_at_open_ms = 0
        self._news: list[str] = []
        self._puts: list[Put] = []
        self._put_bytes = 0
        self._acks: list[wire.Ack] = []
        self._removed: set[int] = set()
        self._next_expiry_ms = now_ms + _EXPIRE_EVERY_MS
        self._next_retry_ms = now_ms + _RETRY_FIRST_MS
        self._retry_ms = _RETRY_FIRST_MS
        self._on_disk_since_ms = now_ms
        self._results = Results()
        self.swaps = 0
        try:
            self._box, self._on_disk = self._open_disk(), True
            self._results.learn(self._box.results())
        except StorageFault as e:
            self._box, self._on_disk = self._in_memory(e), False
        self._run_at_open_ms = self._box.run_ms

    @property
    def on_disk(self) -> bool:
        """Whether rows go to the disk; if not, to memory."""
        return self._on_disk

    def take_news(self) -> list[str]:
        """What happened to the storage since the last call, a sentence each."""
        news, self._news = self._news, []
        return news

    def put(
        self, stream: wire.StreamName, payload: Any, *, priority: int, now_ms: int, life_s: float
    ) -> None:
        """Append one row; it is stored with the next `flush`."""
        body = canonical.to_bytes(payload)
        self._puts.append(Put(stream, priority, int(life_s * 1000), body))
        self._put_bytes += len(body)
        if self._put_bytes > _PENDING_BYTES:
            self._write(now_ms)

    def acknowledged(self, ack: wire.Ack) -> None:
        """The controller has these rows: they are deleted with the next `flush`."""
        self._acks.append(ack)

    def flush(self, now_ms: int) -> set[int]:
        """One transaction for all that has come; returns the ids of rows that are no more, since the last.

        Events are synced to the disk; telemetry survives a kill of the process.
        """
        if not self._on_disk and now_ms >= self._next_retry_ms:
            self._back_to_disk(now_ms)
        if self._puts or self._acks or any(self._results.changes()):
            self._write(now_ms)
        if now_ms >= self._next_expiry_ms:
            self._next_expiry_ms = now_ms + _EXPIRE_EVERY_MS
            self._attempt(lambda: self._removed.update(self._box.expire(self._run_ms(now_ms))), now_ms)
        removed, self._removed = self._removed, set()
        return removed

    def after(self, priority: int, after_id: int, until_id: int, limit: int, now_ms: int) -> list[Row]:
        """Stored rows of one priority with after_id < id <= until_id, oldest first."""
        found: list[Row] = []
        self._attempt(lambda: found.extend(self._box.after(priority, after_id, until_id, limit)), now_ms)
        return found

    @property
    def epoch(self) -> str:
        """Under which new rows are numbered."""
        return self._box.epoch

    @property
    def newest_id(self) -> int:
        """The largest id that a stored row of this box has or had."""
        return self._box.newest_id

    def depth(self) -> int:
        """Rows that wait, those of this turn included."""
        try:
            return self._box.depth() + len(self._puts)
        except StorageFault:
            return len(self._puts)

    def result(self, command_id: str) -> bytes | None:
        """The result of a command, so that the same id again does nothing."""
        return self._results.get(command_id)

    def keep_result(self, command_id: str, expires_ms: int, body: bytes) -> None:
        """Remember a result at least until its command expires; durable with the next `flush`."""
        self._results.add(Result(command_id, expires_ms, body))

    def close(self, now_ms: int) -> None:
        """Store what is left and close."""
        self.flush(now_ms)
        self._box.close()

    def _write(self, now_ms: int) -> None:
        results, forgotten = self._results.changes()
        durable = bool(results) or any(put.stream == "event" for put in self._puts)
        self._attempt(
            lambda: self._removed.update(
                self._box.apply(
                    self._puts,
                    self._acks,
                    run_ms=self._run_ms(now_ms),
                    durable=durable,
                    results=results,
                    forgotten=forgotten,
                )
            ),
            now_ms,
        )
        self._results.stored()
        self._puts, self._acks, self._put_bytes = [], [], 0

    def _attempt(self, use: Any, now_ms: int) -> None:
        """Use the box; if the disk fails, go on in memory and use that."""
        try:
            use()
        except StorageFault as e:
            if not self._on_disk:
                raise  # memory does not fail
            run_ms = self._run_ms(now_ms)
            failed = self._box
            failed.close()
            self._box, self._on_disk = self._in_memory(e, heir_of=failed), False
            self._box.run_ms = self._run_at_open_ms = run_ms
            self._began_ms = now_ms
            if now_ms - self._on_disk_since_ms > _RETRY_MAX_MS:
                self._retry_ms = _RETRY_FIRST_MS  # else it was no recovery
            self._next_retry_ms = now_ms + self._retry_ms
            self.swaps += 1
            use()

    def _back_to_disk(self, now_ms: int) -> None:
        run_ms = self._run_ms(now_ms)
        self._retry_ms = min(2 * self._retry_ms, _RETRY_MAX_MS)
        self._next_retry_ms = now_ms + self._retry_ms
        try:
            disk = self._open_disk()
        except StorageFault:
            return
        try:
            self._results.learn(disk.results())
            moved = disk.adopt(self._box, max(run_ms, disk.run_ms), self._results.all())
        except StorageFault:
            disk.close()
            return
        self._box.close()
        self._box, self._on_disk = disk, True
        self._run_at_open_ms, self._began_ms = max(run_ms, disk.run_ms), now_ms
        self._on_disk_since_ms = now_ms
        self._removed.clear()
        self.swaps += 1
        self._say(f"the outbox is on the disk again; {moved} rows were moved to it from memory")

    def _run_ms(self, now_ms: int) -> int:
        return self._run_at_open_ms + max(0, now_ms - self._began_ms)

    def _in_memory(self, fault: StorageFault, heir_of: Box | None = None) -> Box:
        self._say(f"{fault.what}; until the disk recovers, up to {MEMORY_BYTES} bytes are kept in memory")
        return Box(None, max_bytes=min(self._max_bytes, MEMORY_BYTES), heir_of=heir_of)

    def _open_disk(self) -> Box:
        """Raises StorageFault."""
        files.make_folder(self._path.parent)
        try:
            box = Box(self._path, max_bytes=self._max_bytes)
        except Damaged as e:
            for suffix in ("-wal", "-shm"):
                files.remove_link(self._path.with_name(self._path.name + suffix))
            aside = files.set_aside(self._path, self._stamp_ms)
            self._stamp_ms += 1
            self._say(f"the outbox was damaged ({e}) and set aside as {aside.name}; a new epoch begins")
            return self._open_new()
        if box.dropped:
            self._say(f"{box.dropped} rows of the outbox were damaged on the disk and are lost")
        return box

    def _open_new(self) -> Box:
        try:
            return Box(self._path, max_bytes=self._max_bytes)
        except Damaged as e:  # a disk that damages a file that was just made
            raise StorageFault(Reason.STORAGE_FAULT, f"outbox: {e}", "check the device's disk") from e

    def _say(self, news: str) -> None:
        log.warning("%s", news)
        self._news.append(news)
