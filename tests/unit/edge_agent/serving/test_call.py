"""One call is counted once, against whoever is at fault."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from edge_agent.serving.call import Call
from edge_agent.serving.loader import Opened
from edge_agent.serving.tensors import Array
from edge_agent.serving.version import Version
from edge_agent.stats import VersionStats
from edge_contract.errors import Reason, RequestRejected
from edge_contract.manifest import Tensor
from tests.support.models import make_bundle, samples
from tests.support.serving import binary_request


class Model:
    """A loaded model whose answer the test decides."""

    def __init__(self, answer: Callable[[], Array]) -> None:
        self.inputs = [Tensor("x", "FP32", [-1, 8])]
        self.outputs = [Tensor("scores", "FP32", [-1, 4])]
        self._answer = answer

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"scores": self._answer()}

    def close(self) -> None:
        """Nothing to let go."""


def one() -> Array:
    return np.array([[0, 1, 0, 0]], np.float32)


def call(folder: Path, answer: Callable[[], Array] = one, features: int = 8) -> tuple[Call, Version]:
    bundle = make_bundle(folder)

    async def made() -> Version:
        return Version(Opened(bundle.manifest, bundle.digest, Model(answer)))

    version = asyncio.run(made())
    body, headers = binary_request({"x": ("FP32", samples(1, features=features))})
    return Call(version, body, int(next(iter(headers.values())))), version


def counts(version: Version) -> tuple[int, int, int]:
    stats: VersionStats = version.counters.snapshot()
    assert sum(stats.latency_counts) == stats.requests
    return stats.requests, stats.errors, sum(stats.top1_counts["scores"])


def test_an_answer(tmp_path: Path) -> None:
    made, version = call(tmp_path)
    encoded = made()
    assert json.loads(encoded.body[: encoded.header_length])["model_name"] == "tiny"
    assert counts(version) == (1, 0, 1)


def test_a_request_at_fault_does_not_count(tmp_path: Path) -> None:
    made, version = call(tmp_path, features=7)
    with pytest.raises(RequestRejected):
        made()
    assert counts(version) == (0, 0, 0)


def test_an_overload_does_not_count(tmp_path: Path) -> None:
    made, version = call(tmp_path)
    made.gave_up(Reason.OVERLOADED)
    assert counts(version) == (0, 0, 0)


def failing() -> Array:
    raise RequestRejected(500, Reason.INFERENCE_FAILED, "no", "none")


def mistaken() -> Array:
    raise ZeroDivisionError


@pytest.mark.parametrize(("answer", "error"), [(failing, RequestRejected), (mistaken, ZeroDivisionError)])
def test_a_model_that_fails(tmp_path: Path, answer: Callable[[], Array], error: type[Exception]) -> None:
    made, version = call(tmp_path, answer)
    with pytest.raises(error):
        made()
    assert counts(version) == (1, 1, 0)


def test_an_answer_of_another_shape_than_promised(tmp_path: Path) -> None:
    made, version = call(tmp_path, lambda: np.zeros(4, np.float32))
    with pytest.raises(RequestRejected, match="where it promises"):
        made()
    assert counts(version) == (1, 1, 0)


@pytest.mark.parametrize("answer", [one, failing])
def test_a_deadline_that_passes_counts_once_whatever_comes_later(
    tmp_path: Path, answer: Callable[[], Array]
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def late() -> Array:
        entered.set()
        go_on.wait(10)
        return answer()

    made, version = call(tmp_path, late)

    def work() -> None:
        with suppress(RequestRejected):
            made()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(10)
    made.gave_up(Reason.DEADLINE_EXCEEDED)
    go_on.set()
    thread.join()
    assert counts(version) == (1, 1, 0)
    assert version.counters.errors() == {Reason.DEADLINE_EXCEEDED: 1}
