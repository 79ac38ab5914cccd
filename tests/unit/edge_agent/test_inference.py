"""The control process's side of the control socket: answers, refusals by culprit, silence, nonsense."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.config import Config
from edge_agent.inference import InferenceClient, Loaded
from edge_agent.layout import Layout
from edge_contract.errors import (
    BundleRejected,
    DeviceUnfit,
    EdgewardError,
    Reason,
    StorageFault,
    TransferFailed,
)
from tests.support.control_double import InferenceDouble
from tests.support.models import BundleOnDisk, install, make_bundle
from tests.support.waiting import wait_for

INDEX, STATS = "/v2/repository/index", "/edgeward/v1/stats"
LOAD = "/v2/repository/models/tiny/load"


@pytest.fixture
def layout() -> Iterator[Layout]:
    with tempfile.TemporaryDirectory(prefix="ew-") as folder:  # a socket's path is short
        yield Layout(Config(tenant="t", device="d", state_dir=f"{folder}/state", run_dir=f"{folder}/run"))


@pytest.fixture
def double(layout: Layout) -> Iterator[InferenceDouble]:
    with InferenceDouble(layout) as double:
        yield double


@pytest.fixture
def bundle(layout: Layout, tmp_path: Path) -> BundleOnDisk:
    bundle = make_bundle(tmp_path)
    install(bundle, layout)
    return bundle


@pytest.fixture
def client(layout: Layout) -> InferenceClient:
    return InferenceClient(layout.control_socket)


def test_load_index_stats_unload(
    client: InferenceClient, double: InferenceDouble, bundle: BundleOnDisk
) -> None:
    assert client.index() == []
    client.load("tiny", bundle.digest, 5.0)
    assert client.index() == [Loaded("tiny", "1.0.0", bundle.digest, True, Reason.OK)]
    double.count(bundle.digest, 7)
    stats = client.stats()
    assert (stats.pid, [(v.digest, v.requests) for v in stats.versions]) == (100, [(bundle.digest, 7)])
    double.notes["tiny"] = Reason.FAILED_STARTS
    assert client.index()[0].reason is Reason.FAILED_STARTS
    client.unload("tiny", 5.0)
    assert client.index() == []


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (422, Reason.LOAD_FAILED, BundleRejected),
        (501, Reason.RUNTIME_MISSING, DeviceUnfit),
        (507, Reason.STORAGE_FAULT, StorageFault),
        (404, Reason.NOT_FOUND, DeviceUnfit),
        (400, Reason.BAD_INPUT, DeviceUnfit),
    ],
)
def test_a_refused_load_is_the_fault_of_who_is_at_fault(
    client: InferenceClient,
    double: InferenceDouble,
    bundle: BundleOnDisk,
    status: int,
    reason: Reason,
    kind: type[EdgewardError],
) -> None:
    double.refuse[bundle.digest] = (status, reason)
    with pytest.raises(EdgewardError) as fault:
        client.load("tiny", bundle.digest, 5.0)
    assert type(fault.value) is kind
    assert (fault.value.reason, fault.value.what, fault.value.next_step) == (reason, "it does not", "try")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_load_at_the_wrong_moment_may_be_tried_again(
    client: InferenceClient, double: InferenceDouble, bundle: BundleOnDisk, status: int
) -> None:
    double.refuse[bundle.digest] = (status, Reason.OVERLOADED)
    with pytest.raises(TransferFailed, match=f"status {status}"):
        client.load("tiny", bundle.digest, 5.0)


@pytest.mark.parametrize("body", [b"", b"sorry", b"[]", b"{}", b'{"reason":"no_such_code"}', b"\xff"])
def test_a_refusal_that_says_nothing_may_be_tried_again(
    client: InferenceClient, double: InferenceDouble, body: bytes
) -> None:
    double.instead[LOAD] = (422, body)
    with pytest.raises(TransferFailed):
        client.load("tiny", "1" * 64, 5.0)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b""),
        (200, b"sorry"),
        (200, b"{}x"),
        (200, b"[1]"),
        (200, b'[{"name":"tiny"}]'),
        (200, b"\xff\xfe"),
        (200, b'[{"name":"a","version":"","digest":"","state":"READY","reason":"new_in_a_later_release"}]'),
        (403, b'{"reason":"not_allowed","what":"x","next_step":"y"}'),
        (500, b""),
    ],
)
def test_nonsense_counts_as_silence(
    client: InferenceClient, double: InferenceDouble, status: int, body: bytes
) -> None:
    """Whatever the other process says, the control loop survives it."""
    double.instead |= {INDEX: (status, body), STATS: (status, body)}
    for ask in (client.index, client.stats):
        with pytest.raises(TransferFailed) as fault:
            ask()
        assert fault.value.reason is Reason.SERVING_UNREACHABLE


def test_a_lifeline_breaks_with_the_process_and_only_then(
    client: InferenceClient, double: InferenceDouble
) -> None:
    line = client.lifeline()
    client.index()
    assert not line.broke()
    for _ in range(3):
        time.sleep(0.05)  # until the other end has taken it
        double.restart()
        wait_for(line.broke, "the break", timeout_s=5)
        assert not line.broke()
    double.stop()
    wait_for(line.broke, "the break", timeout_s=5)
    assert not line.broke()  # nobody there: nothing that could end
    double.start()
    assert not line.broke()
    line.close()


def test_nobody_listens(client: InferenceClient, layout: Layout) -> None:
    with pytest.raises(TransferFailed, match="does not answer"):
        client.index()


def test_a_held_socket_that_nobody_reads_is_given_up_on(client: InferenceClient, layout: Layout) -> None:
    """As while the inference process restarts under a supervisor that keeps its sockets."""
    layout.run.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        held.bind(str(layout.control_socket))
        held.listen()
        begun_s = time.monotonic()
        with pytest.raises(TransferFailed, match="timed out"):
            client.index(timeout_s=0.2)
        assert time.monotonic() - begun_s < 1.0
