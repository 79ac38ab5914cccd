"""The HTTP face of a real process: every route, every refusal, always JSON."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent import config as configuration
from edge_agent.inference import InferenceClient
from edge_agent.layout import Layout
from edge_agent.stats import ServingStats, bucket
from edge_contract import canonical
from edge_contract.errors import EdgewardError, Reason
from edge_contract.manifest import Tensor
from tests.support.models import (
    ABOVE,
    identity_net,
    install,
    make_bundle,
    samples,
    scores,
    write_bundle,
)
from tests.support.serving import (
    HEADER_LENGTH,
    Answer,
    Client,
    Serving,
    binary_output,
    binary_request,
    serving,
    write_config,
)

LIMIT = 100_000
INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Models: tiny, fails (error above), nan, half (an FP16 identity), gone (does not load)."""
    folder = tmp_path_factory.mktemp("http")
    config = write_config(folder, max_body_bytes=LIMIT, request_timeout_s=2.0, max_queue=1, workers=1)
    layout = Layout(configuration.load(config))
    install(make_bundle(folder), layout)
    install(make_bundle(folder, "fails", fault="error_above"), layout)
    install(make_bundle(folder, "nan", fault="nan_above"), layout)
    install(make_bundle(folder, "slow", fault="slow_above"), layout)
    install(make_bundle(folder, "gone", fault="garbage"), layout)
    half = np.ones((1, 2), np.float16)
    install(
        write_bundle(
            folder / "half",
            "half",
            "1",
            1,
            model=identity_net({"h": ("FP16", [-1, 2])}),
            inputs=[Tensor("h", "FP16", [-1, 2])],
            outputs=[Tensor("h_out", "FP16", [-1, 2])],
            golden={"input:h": half, "output:h_out": half},
        ),
        layout,
    )
    with serving(config) as started:
        yield started


@pytest.fixture
def client(server: Serving) -> Iterator[Client]:
    made = server.client()
    yield made
    made.close()


@pytest.fixture
def controller(server: Serving) -> Iterator[Client]:
    made = server.controller()
    yield made
    made.close()


def refused(answer: Answer, status: int, reason: Reason) -> str:
    """Checks the form of an error; returns its sentence."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json) == {"error", "what", "reason", "next_step"}
    assert answer.json["reason"] == reason.value
    assert answer.json["next_step"]
    assert answer.json["error"] == f"{answer.json['what']} → {answer.json['next_step']}"
    assert "Traceback" not in answer.json["error"]
    return str(answer.json["what"])


def test_server_metadata(client: Client) -> None:
    answer = client.request("GET", "/v2")
    assert answer.status == 200
    assert answer.json["name"] == "edgeward"
    assert set(answer.json["extensions"]) == {"binary_tensor_data", "model_repository"}


def test_health(client: Client) -> None:
    assert client.request("GET", "/v2/health/live").json == {"live": True}
    # One model does not load, and the protocol's "ready" is about all of them.
    refused(client.request("GET", "/v2/health/ready"), 503, Reason.MODEL_NOT_READY)
    assert client.request("GET", "/v2/models/tiny/ready").json == {"name": "tiny", "ready": True}
    assert client.request("GET", "/v2/models/tiny/versions/1.0.0/ready").status == 200
    said = refused(client.request("GET", "/v2/models/gone/ready"), 503, Reason.MODEL_NOT_READY)
    assert "does not load" in said


@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/1.0.0"])
def test_model_metadata(client: Client, path: str) -> None:
    assert client.request("GET", path).json == {
        "name": "tiny",
        "versions": ["1.0.0"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 8]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 4]}],
    }


def test_head_is_get_without_a_body(client: Client) -> None:
    answer = client.request("HEAD", "/v2")
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("path", ["tiny", "tiny/versions/1.0.0"])
def test_inference(client: Client, binary: bool, path: str) -> None:
    x = samples(5)
    answer = client.infer(path, x, binary=binary)
    assert answer.status == 200, answer.body
    if binary:
        assert answer.headers["content-type"] == "application/octet-stream"
        got = binary_output(answer)
    else:
        output = answer.json["outputs"][0]
        assert (answer.json["model_name"], answer.json["model_version"]) == ("tiny", "1.0.0")
        got = np.array(output["data"], np.float32).reshape(output["shape"])
    np.testing.assert_allclose(got, scores(x), atol=1e-6)


def test_inference_over_the_unix_socket(server: Serving) -> None:
    with Client(server.local) as local:
        answer = local.infer("tiny", samples(1))
    np.testing.assert_allclose(binary_output(answer), scores(samples(1)), atol=1e-6)


def test_answers_on_tcp_do_not_wait_for_acknowledgements(client: Client) -> None:
    """With Nagle's algorithm on, every answer would take 40 ms."""
    client.infer("tiny", samples(1))
    begun_s = time.perf_counter()
    for _ in range(20):
        client.infer("tiny", samples(1))
    assert time.perf_counter() - begun_s < 20 * 0.03


def json_x(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [0.5] * 8, **changes}]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "image"}, "no input 'image'; it takes x FP32 [-1, 8]"),
        ({"shape": [1, 7], "data": [0.5] * 7}, "shape [1, 7], the model takes x FP32 [-1, 8]"),
        ({"datatype": "INT64"}, "declared INT64"),
        ({"data": [0.5] * 9}, "9 elements"),
    ],
)
def test_bad_tensors_in_json(client: Client, changes: dict[str, Any], named: str) -> None:
    assert named in refused(client.request("POST", INFER, json_x(**changes)), 400, Reason.BAD_TENSOR)


def test_bad_tensors_in_binary(client: Client) -> None:
    good, headers = binary_request({"x": ("FP32", samples(1))})
    cases = {
        "announces 32 bytes, the body has 31 left": good[:-1],
        "1 bytes more than its tensors announce": good + b"\0",
    }
    for named, body in cases.items():
        assert named in refused(client.request("POST", INFER, body, headers), 400, Reason.BAD_TENSOR)
    for name, array in (("image", samples(1)), ("x", samples(1, features=7))):
        body, headers = binary_request({name: ("FP32", array)})
        refused(client.request("POST", INFER, body, headers), 400, Reason.BAD_TENSOR)
    body, headers = binary_request({"x": ("FP64", samples(1).astype(np.float64))})
    assert "declared FP64" in refused(client.request("POST", INFER, body, headers), 400, Reason.BAD_TENSOR)


@pytest.mark.parametrize("value", ["x", "-1", "", "1e3", "99999999999999999999"])
def test_a_json_length_that_is_no_number(client: Client, value: str) -> None:
    answer = client.request("POST", INFER, b"{}", {HEADER_LENGTH: value})
    refused(answer, 400, Reason.BAD_INPUT)


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"\xff\xff"])
def test_bodies_that_are_no_request(client: Client, body: bytes) -> None:
    answer = client.request("POST", INFER, body)
    assert answer.status == 400
    assert answer.json["reason"] in ("bad_input", "bad_tensor")


def test_a_body_over_the_limit_announced_and_not(client: Client, server: Serving) -> None:
    large = b" " * (LIMIT + 1)
    said = refused(client.request("POST", INFER, large), 413, Reason.BODY_TOO_LARGE)
    assert str(LIMIT) in said
    # The connection is still in step: the rest of the body was read and dropped.
    assert client.infer("tiny", samples(1)).status == 200
    # In chunks, without a Content-Length.
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
    received = raw(server.tcp, head.encode() + chunk * (LIMIT // 0x2000 + 1) + b"0\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 413 ")
    assert client.request("POST", INFER, b" " * LIMIT).status == 400


def test_compressed_bodies_are_refused(client: Client) -> None:
    refused(client.request("POST", INFER, b"x", {"Content-Encoding": "gzip"}), 415, Reason.BAD_INPUT)


def test_unknown_models_and_versions(client: Client) -> None:
    said = refused(client.infer("absent", samples(1)), 404, Reason.UNKNOWN_MODEL)
    assert "'absent'" in said
    assert "tiny" in said
    said = refused(client.infer("tiny/versions/9", samples(1)), 404, Reason.UNKNOWN_MODEL)
    assert "serves version '1.0.0', not '9'" in said
    refused(client.infer("gone", samples(1)), 503, Reason.MODEL_NOT_READY)


def test_paths_and_methods(client: Client) -> None:
    refused(client.request("GET", "/"), 404, Reason.NOT_FOUND)
    refused(client.request("GET", "/v2/models/tiny/infer/more"), 404, Reason.NOT_FOUND)
    assert "use POST" in client.request("GET", INFER).json["error"]
    refused(client.request("GET", INFER), 405, Reason.NOT_ALLOWED)
    refused(client.request("DELETE", "/v2/models/tiny"), 405, Reason.NOT_ALLOWED)


def test_clients_may_look_but_not_change(client: Client, server: Serving) -> None:
    with Client(server.local) as local:
        for each in (client, local):
            for path in ("/v2/repository/models/tiny/load", "/v2/repository/models/tiny/unload"):
                refused(each.request("POST", path, {}), 403, Reason.NOT_ALLOWED)
            refused(each.request("GET", "/edgeward/v1/stats"), 403, Reason.NOT_ALLOWED)
            assert each.request("POST", "/v2/repository/index").status == 200
    assert client.infer("tiny", samples(1)).status == 200


def test_the_index_says_what_serves_and_what_does_not(client: Client) -> None:
    entries = {e["name"]: e for e in client.request("POST", "/v2/repository/index", {}).json}
    assert set(entries) == {"tiny", "fails", "nan", "half", "gone", "slow"}
    assert (entries["tiny"]["state"], entries["tiny"]["version"], entries["tiny"]["reason"]) == (
        "READY",
        "1.0.0",
        "",
    )
    assert len(entries["tiny"]["digest"]) == 64
    assert (entries["gone"]["state"], entries["gone"]["reason"]) == ("UNAVAILABLE", "load_failed")
    ready = client.request("POST", "/v2/repository/index", {"ready": True}).json
    assert {e["name"] for e in ready} == set(entries) - {"gone"}
    refused(client.request("POST", "/v2/repository/index", {"all": True}), 400, Reason.BAD_INPUT)


def stats(controller: Client, name: str) -> Any:
    answer = controller.request("GET", "/edgeward/v1/stats")
    found = canonical.from_bytes(answer.body, ServingStats)
    return next(v for v in found.versions if v.name == name)


def test_statistics_count_what_was_served(client: Client, controller: Client, server: Serving) -> None:
    before = stats(controller, "tiny")
    x = samples(3)
    for _ in range(4):
        client.infer("tiny", x)
    client.infer("tiny", samples(1, features=9))  # a request at fault is no request of the version
    after = stats(controller, "tiny")
    assert after.requests - before.requests == 4
    assert after.errors == before.errors
    assert sum(after.latency_counts) == after.requests
    counted = np.array(after.top1_counts["scores"]) - np.array(before.top1_counts["scores"])
    assert counted.tolist() == (4 * np.bincount(scores(x).argmax(axis=1), minlength=4)).tolist()
    assert InferenceClient(server.control).stats().pid == server.pid


def test_a_model_that_fails_on_an_input(client: Client, controller: Client) -> None:
    x = samples(1)
    assert client.infer("fails", x).status == 200
    x[0, 0] = ABOVE
    before = stats(controller, "fails")
    said = refused(client.infer("fails", x), 500, Reason.INFERENCE_FAILED)
    assert "onnxruntime" in said
    after = stats(controller, "fails")
    assert (after.requests - before.requests, after.errors - before.errors) == (1, 1)
    assert client.infer("fails", samples(1)).status == 200


def test_answers_that_are_not_finite(client: Client, controller: Client) -> None:
    x = samples(1)
    x[0, 0] = ABOVE
    binary = client.infer("nan", x)
    assert binary.status == 200
    assert np.isnan(binary_output(binary)).all()
    refused(client.infer("nan", x, binary=False), 500, Reason.NON_FINITE_OUTPUT)
    assert stats(controller, "nan").non_finite == 2


def test_half_precision_goes_binary_only(client: Client) -> None:
    x = np.array([[1.5, -2]], np.float16)
    body, headers = binary_request({"h": ("FP16", x)})
    answer = client.request("POST", "/v2/models/half/infer", body, headers)
    assert answer.body[int(answer.headers[HEADER_LENGTH.lower()]) :] == x.tobytes()
    as_json = {"inputs": [{"name": "h", "shape": [1, 2], "datatype": "FP16", "data": [1.5, -2]}]}
    refused(client.request("POST", "/v2/models/half/infer", as_json), 400, Reason.BAD_TENSOR)


def test_too_many_at_a_time_are_told_to_come_back(server: Serving, controller: Client) -> None:
    """One worker, one may wait: of twelve slow ones at once most are refused, none is lost."""
    x = samples(1)
    x[0, 0] = ABOVE
    body, headers = binary_request({"x": ("FP32", x)})
    clients = [server.client() for _ in range(12)]
    for each in clients:
        each.begin("/v2/models/slow/infer", body, headers)
    found = [each.finish() for each in clients]
    statuses = [answer.status for answer in found]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 2
    for answer in found:
        if answer.status == 503:
            refused(answer, 503, Reason.OVERLOADED)
            assert answer.headers["retry-after"] == "1"
    assert stats(controller, "slow").errors == 0
    for each in clients:
        each.close()


def test_metrics(client: Client) -> None:
    client.infer("tiny", samples(1))
    client.infer("absent", samples(1))
    answer = client.request("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.body.decode()
    assert 'edgeward_requests_total{model="tiny",version="1.0.0"}' in text
    assert 'edgeward_rejected_total{reason="unknown_model"}' in text
    resident = next(float(t.split()[1]) for t in text.splitlines() if t.startswith("process_resident"))
    assert 20e6 < resident < 200e6


def raw(address: str, *parts: bytes) -> bytes:
    """What a server answers to raw bytes, until it closes."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as s:
        for part in parts:
            try:
                s.sendall(part)
            except OSError:
                break  # it has answered and closed already
        received = b""
        try:
            while chunk := s.recv(65536):
                received += chunk
        except ConnectionResetError:
            pass
        return received


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"GET /v2 HTTP/9.9\r\n\r\n",
        b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_malformed_http_is_answered_in_json(server: Serving, sent: bytes) -> None:
    head, _, body = raw(server.tcp, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(body)["reason"] == "bad_input"
    assert not any("Traceback" in line for line in server.log())


def test_a_head_that_does_not_end_is_cut_off(server: Serving) -> None:
    filler = b"X-Filler: " + b"a" * 30_000 + b"\r\n"
    answer = raw(server.tcp, b"GET /v2 HTTP/1.1\r\nHost: x\r\n", filler, filler, filler, filler)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["reason"] == "bad_input"


def test_a_body_that_does_not_come_is_given_up(server: Serving) -> None:
    host, port = server.tcp.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as s:
        s.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n123")
        answer = s.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_goes_away_harms_nobody(server: Serving, client: Client) -> None:
    host, port = server.tcp.split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=10) as s:
            s.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n123")
    assert client.infer("tiny", samples(1)).status == 200
    assert not any("Traceback" in line or "Exception" in line for line in server.log())


def test_requests_one_after_the_other_without_waiting(server: Serving) -> None:
    body, headers = binary_request({"x": ("FP32", samples(1))})
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    one = head.encode() + b"\r\n" + body
    last = one.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")
    assert raw(server.tcp, one + one + last).count(b"HTTP/1.1 200 OK") == 3


def test_control_bodies_are_strict(controller: Client) -> None:
    path = "/v2/repository/models/tiny/load"
    for body in ({"digest": "a" * 64}, {"parameters": {"digest": "xyz"}}, {"parameters": {"config": "{}"}}):
        refused(controller.request("POST", path, body), 400, Reason.BAD_INPUT)
    refused(controller.request("POST", path, b"{"), 400, Reason.BAD_INPUT)


def test_loading_what_the_store_does_not_have(controller: Client, server: Serving) -> None:
    body = {"parameters": {"digest": "a" * 64}}
    refused(controller.request("POST", "/v2/repository/models/tiny/load", body), 404, Reason.NOT_FOUND)
    refused(controller.request("POST", "/v2/repository/models/absent/load", {}), 404, Reason.NOT_FOUND)
    with pytest.raises(EdgewardError, match="not in the store"):
        InferenceClient(server.control).load("tiny", "a" * 64, 5)
    assert "absent" not in server.index()


def test_the_control_socket_is_the_owners_alone(server: Serving) -> None:
    assert Path(server.control).stat().st_mode & 0o777 == 0o600
    assert Path(server.local).stat().st_mode & 0o777 == 0o660


def test_latency_of_a_slow_request_is_counted_whole(client: Client, controller: Client) -> None:
    x = samples(1)
    x[0, 0] = ABOVE
    before = stats(controller, "slow")
    begun_s = time.perf_counter()
    assert client.infer("slow", x).status == 200
    took_ms = (time.perf_counter() - begun_s) * 1000
    after = stats(controller, "slow")
    grown = [
        i for i, (a, b) in enumerate(zip(after.latency_counts, before.latency_counts, strict=True)) if a > b
    ]
    assert len(grown) == 1
    assert bucket(took_ms * 0.5) <= grown[0] <= bucket(took_ms)
