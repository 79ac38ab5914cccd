"""How many requests may wait, how many run, and what becomes of those that wait too long.

`Admission` is pure counting; `Workers` drives it with threads. Which model runs is not its business.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import time
from collections.abc import Callable
from typing import TypeVar

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


class Workers:
    """Threads that run inferences.

    Invariants: every method is called on the event loop. A place is held until its thread has really
    finished, not until its caller gave up; so a hung model cannot pile up work behind it. `done` of
    every call is called exactly once, on the loop, when nothing of the call runs any more.
    """

    def __init__(self, workers: int, max_queue: int) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, "inference")
        self._size = workers
        self._admission = Admission(workers, max_queue)
        self._tickets = itertools.count()
        self._since_s: dict[int, float] = {}

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
        future = self._submit(work, done)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
        except TimeoutError as e:
            raise RequestRejected(
                504,
                Reason.DEADLINE_EXCEEDED,
                f"no answer within {timeout_s:g} s",
                "retry later; if it stays so, the model is too slow for this device or the load too high",
            ) from e

    def stuck(self, limit_s: float) -> bool:
        """Whether every worker has been in one run for more than `limit_s`."""
        now_s = time.monotonic()
        since = list(self._since_s.values())
        return len(since) == self._size and all(now_s - t > limit_s for t in since)

    def idle(self) -> bool:
        """Whether no thread is in a run."""
        return not self._since_s

    def close(self) -> None:
        """Take no more work; does not wait for a run that hangs."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Callable[[], T], done: Callable[[], None]) -> concurrent.futures.Future[T]:
        loop = asyncio.get_running_loop()

        def leave() -> None:
            self._admission.leave()
            done()

        future = self._pool.submit(self._timed, next(self._tickets), work)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(leave))
        return future

    def _timed(self, ticket: int, work: Callable[[], T]) -> T:
        self._since_s[ticket] = time.monotonic()
        try:
            return work()
        finally:
            del self._since_s[ticket]
