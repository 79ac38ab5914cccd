"""How many requests may wait, how many run, and what becomes of those that wait too long.

`Admission` is pure counting; `Workers` drives it with threads. Which model runs is not its business.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from edge_contract.errors import Reason, RequestRejected

T = TypeVar("T")

_RETRY_AFTER_S = 1


class Admission:
    """Pure: a bounded waiting room in front of `workers` places."""

    def __init__(self, workers: int, max_queue: int) -> None:
        self._workers = workers
        self._limit = workers + max_queue
        self.inside = 0

    @property
    def running(self) -> int:
        """How many are in a worker."""
        return min(self.inside, self._workers)

    @property
    def waiting(self) -> int:
        """How many wait for a worker."""
        return self.inside - self.running

    def enter(self) -> None:
        """Take a place. Raises RequestRejected (503, OVERLOADED) when the waiting room is full."""
        if self.inside >= self._limit:
            raise RequestRejected(
                503,
                Reason.OVERLOADED,
                f"{self.waiting} requests are waiting already, which is the limit",
                "send fewer at a time, or raise serving.max_queue or serving.workers",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.inside += 1

    def leave(self) -> None:
        """Give the place back."""
        self.inside -= 1


class _Job:
    """One piece of work. Whoever claims it first, a worker or the caller who gives up, owns it."""

    __slots__ = ("_unclaimed", "done", "result", "work")

    def __init__(
        self, work: Callable[[], Any], done: Callable[[], None], result: asyncio.Future[Any]
    ) -> None:
        self.work, self.done, self.result = work, done, result
        self._unclaimed = [True]

    def claim(self) -> bool:
        """True once."""
        try:
            return self._unclaimed.pop()  # atomic, and cheaper than a lock
        except IndexError:
            return False


class Workers:
    """Threads that run inferences.

    Invariants: every public method is called on the event loop. A place is held until its thread has
    really finished, not until its caller gave up; so a hung model cannot pile up work behind it. `done`
    of every call is called exactly once, on the loop, when nothing of the call runs any more.

    Not a ThreadPoolExecutor: that one costs twice as much per call, and joins its threads at exit, which
    a run that hangs would turn into a process that hangs.
    """

    def __init__(self, workers: int, max_queue: int) -> None:
        self._size = workers
        self._admission = Admission(workers, max_queue)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._since_s: dict[int, float] = {}
        self._loop = asyncio.get_running_loop()
        for number in range(workers):
            threading.Thread(target=self._serve, args=(number,), name=f"worker-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Requests that wait for a worker."""
        return self._admission.waiting

    @property
    def running(self) -> int:
        """Requests in a worker."""
        return self._admission.running

    async def run(self, work: Callable[[], T], done: Callable[[], None], timeout_s: float) -> T:
        """The result of `work`, which runs in a worker thread.

        Raises RequestRejected: OVERLOADED at once, DEADLINE_EXCEEDED after `timeout_s`.
        """
        try:
            self._admission.enter()
        except RequestRejected:
            done()
            raise
        job = _Job(work, done, self._loop.create_future())
        self._jobs.put(job)
        try:
            async with asyncio.timeout(timeout_s):
                result: T = await job.result
                return result
        except TimeoutError as e:
            raise RequestRejected(
                504,
                Reason.DEADLINE_EXCEEDED,
                f"no answer within {timeout_s:g} s",
                "retry later; if it stays so, the model is too slow for this device or the load too high",
            ) from e
        finally:
            if job.claim():  # given up before a worker took it: it never runs
                self._leave(job)

    def stuck(self, limit_s: float) -> bool:
        """Whether every worker has been in one run for more than `limit_s`."""
        now_s = time.monotonic()
        since = list(self._since_s.values())
        return len(since) == self._size and all(now_s - t > limit_s for t in since)

    def idle(self) -> bool:
        """Whether no thread is in a run."""
        return not self._since_s

    def close(self) -> None:
        """End the threads; does not wait for a run that hangs."""
        for _ in range(self._size):
            self._jobs.put(None)

    def _leave(self, job: _Job) -> None:
        self._admission.leave()
        job.done()

    def _serve(self, number: int) -> None:
        """A worker thread's life."""
        while (job := self._jobs.get()) is not None:
            if not job.claim():
                continue
            self._since_s[number] = time.monotonic()
            try:
                outcome: tuple[Any, BaseException | None] = (job.work(), None)
            except BaseException as e:  # noqa: BLE001 - it is the caller's, whatever it is
                outcome = (None, e)
            del self._since_s[number]
            try:
                self._loop.call_soon_threadsafe(self._finish, job, *outcome)
            except RuntimeError:
                return  # the loop is closed: the process ends, and nobody waits for this

    def _finish(self, job: _Job, result: Any, error: BaseException | None) -> None:
        self._leave(job)
        if job.result.done():
            return  # the caller gave up meanwhile
        if error is None:
            job.result.set_result(result)
        else:
            job.result.set_exception(error)
