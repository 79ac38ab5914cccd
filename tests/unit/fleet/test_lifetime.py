"""The end by signal: normal, at any moment, and as often as it is asked for."""

from __future__ import annotations

import os
import signal
import time
from threading import Thread

import pytest

from fleet.lifetime import until_signalled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with until_signalled() as stop:
        assert not stop.wait(0.01)
        os.kill(os.getpid(), number)
        assert stop.wait(5)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(0)
    assert signal.getsignal(number) == before


def test_a_second_interrupt_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupt_twice()


def _interrupt_twice() -> None:
    with until_signalled() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_a_signal_at_any_moment_of_the_wait() -> None:
    """A handler that took a lock of the waiter would hang here sooner or later."""
    for pause in range(200):
        with until_signalled() as stop:
            later = Thread(target=lambda s: (time.sleep(s), os.kill(os.getpid(), 15)), args=(pause * 1e-5,))
            later.start()
            while not stop.wait(0.0001):
                pass
            later.join()
