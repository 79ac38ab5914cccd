"""Jobs on threads, where no thread can be made."""

from __future__ import annotations

import threading

import pytest

from edge_agent.update.changes import Step
from edge_agent.update.jobs import ThreadJob
from edge_agent.update.machine import Event
from edge_contract.errors import Reason, StorageFault


def test_too_many_tasks_are_a_fault_that_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no)
    with pytest.raises(StorageFault, match="no thread can be made now") as caught:
        ThreadJob(lambda: Step(Event.ACTIVATED))
    assert caught.value.reason is Reason.STORAGE_FAULT
