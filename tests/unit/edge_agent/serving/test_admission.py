"""Places are bounded, deadlines hold, and a place is given back exactly once, when its thread has ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from edge_agent.serving.admission import Admission, Workers
from edge_contract.errors import Reason, RequestRejected
from tests.support.serving import wait_until


def test_counting() -> None:
    admission = Admission(workers=2, max_queue=1)
    seen = []
    for _ in range(3):
        admission.enter()
        seen.append((admission.running, admission.waiting))
    assert seen == [(1, 0), (2, 0), (2, 1)]
    with pytest.raises(RequestRejected) as refusal:
        admission.enter()
    assert (refusal.value.status, refusal.value.reason) == (503, Reason.OVERLOADED)
    assert refusal.value.retry_after_s == 1
    assert admission.inside == 3
    admission.leave()
    admission.enter()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def soon(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_result_and_its_place() -> None:
    async def check() -> None:
        workers, done = Workers(1, 0), []
        assert await workers.run(lambda: 7, lambda: done.append(1), 5) == 7
        await soon(lambda: done == [1])
        assert (workers.running, workers.waiting, workers.idle()) == (0, 0, True)
        workers.close()

    run(check())


def test_an_exception_comes_back_and_the_place_too() -> None:
    async def check() -> None:
        workers, done = Workers(1, 0), []

        def fail() -> None:
            raise RequestRejected(500, Reason.INFERENCE_FAILED, "no", "none")

        with pytest.raises(RequestRejected, match="no"):
            await workers.run(fail, lambda: done.append(1), 5)
        await soon(lambda: done == [1])
        workers.close()

    run(check())


def test_more_than_the_queue_holds_is_refused_at_once() -> None:
    async def check() -> None:
        workers, gate, done = Workers(1, 1), threading.Event(), []
        calls = [asyncio.create_task(workers.run(gate.wait, lambda: done.append(1), 5)) for _ in range(2)]
        await soon(lambda: (workers.running, workers.waiting) == (1, 1))
        with pytest.raises(RequestRejected) as refusal:
            await workers.run(gate.wait, lambda: done.append(2), 5)
        assert refusal.value.reason is Reason.OVERLOADED
        assert done == [2]  # what it had pinned is let go, although nothing ran
        gate.set()
        assert await asyncio.gather(*calls) == [True, True]
        await soon(lambda: sorted(done) == [1, 1, 2])
        workers.close()

    run(check())


def test_a_deadline_frees_the_caller_but_not_the_thread() -> None:
    async def check() -> None:
        workers, gate, done = Workers(1, 1), threading.Event(), []
        with pytest.raises(RequestRejected) as refusal:
            await workers.run(gate.wait, lambda: done.append("ran"), 0.05)
        assert (refusal.value.status, refusal.value.reason) == (504, Reason.DEADLINE_EXCEEDED)
        assert workers.running == 1
        assert done == []
        assert workers.stuck(0.01)
        assert not workers.stuck(60)
        # One that waits behind it and gives up never runs, and its place is free at once.
        with pytest.raises(RequestRejected, match="no answer within"):
            await workers.run(lambda: done.append("wrong"), lambda: done.append("queued"), 0.05)
        await soon(lambda: done == ["queued"])
        assert workers.waiting == 0
        gate.set()
        await soon(lambda: done == ["queued", "ran"])
        assert workers.idle()
        workers.close()

    run(check())


def test_no_worker_is_stuck_while_one_is_free() -> None:
    async def check() -> None:
        workers, gate = Workers(2, 0), threading.Event()
        call = asyncio.create_task(workers.run(gate.wait, lambda: None, 5))
        await soon(lambda: not workers.idle())
        assert not workers.stuck(0)
        gate.set()
        await call
        workers.close()

    run(check())


def test_closing_does_not_wait_for_a_thread_that_hangs() -> None:
    gate, started = threading.Event(), threading.Event()

    async def check() -> None:
        workers = Workers(1, 0)

        def hang() -> None:
            started.set()
            gate.wait()

        call = asyncio.create_task(workers.run(hang, lambda: None, 0.05))
        await asyncio.wait((call,))
        assert isinstance(call.exception(), RequestRejected)
        workers.close()
        assert not workers.idle()
        gate.set()
        await soon(workers.idle)

    run(check())
    wait_until(started.is_set, "the thread ran")
