"""An existing client, unchanged, against `edge-agent serve`: tritonclient over HTTP, binary and JSON."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from edge_agent import config as configuration
from edge_agent.layout import Layout
from edge_contract.manifest import Tensor
from tests.support.models import Array, identity_net, install, make_bundle, samples, scores, write_bundle
from tests.support.serving import Serving, serving, write_config

KINDS = {
    "text": ("BYTES", [-1, 2]),
    "whole": ("INT64", [-1]),
    "small": ("UINT8", [-1, 3]),
    "half": ("FP16", [-1, 2]),
    "double": ("FP64", []),
    "flag": ("BOOL", [-1]),
}


def every_kind() -> dict[str, Array]:
    return {
        "text": np.array([["ä".encode(), b""], [b"x\0y", b"long " * 50]], np.object_),
        "whole": np.array([-(2**63), 2**63 - 1], np.int64),
        "small": np.array([[0, 127, 255]], np.uint8),
        "half": np.array([[0.5, -65504]], np.float16),
        "double": np.array(1e300),
        "flag": np.array([True, False]),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("triton")
    config = write_config(folder)
    layout = Layout(configuration.load(config))
    install(make_bundle(folder), layout)
    sample = {
        "text": np.array([[b"a", b"b"]]),
        "whole": np.array([5]),
        "small": np.array([[1, 2, 3]], np.uint8),
        "half": np.array([[0.5, 1]], np.float16),
        "double": np.array([1.5]),
        "flag": np.array([True]),
    }
    echo = write_bundle(
        folder / "echo",
        "echo",
        "7",
        1,
        model=identity_net({k: (d, s) for k, (d, s) in KINDS.items()}),  # type: ignore[misc]
        inputs=[Tensor(k, d, s) for k, (d, s) in KINDS.items()],  # type: ignore[arg-type]
        outputs=[Tensor(f"{k}_out", d, s) for k, (d, s) in KINDS.items()],  # type: ignore[arg-type]
        golden={f"input:{k}": v for k, v in sample.items()}
        | {f"output:{k}_out": v for k, v in sample.items()},
    )
    install(echo, layout)
    with serving(config) as started:
        yield started


@pytest.fixture
def client(server: Serving) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(server.tcp)
    yield made
    made.close()


def tensor(name: str, datatype: str, array: Array, *, binary: bool) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1.0.0")
    assert not client.is_model_ready("tiny", "9")
    assert not client.is_model_ready("absent")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("tiny")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 8]}]
    assert metadata["outputs"][0]["name"] == "scores"


def test_the_repository_index(client: triton.InferenceServerClient) -> None:
    index = {e["name"]: (e["version"], e["state"]) for e in client.get_model_repository_index()}
    assert index == {"tiny": ("1.0.0", "READY"), "echo": ("7", "READY")}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_inference(client: triton.InferenceServerClient, binary_in: bool, binary_out: bool) -> None:
    x = samples(6)
    result = client.infer(
        "tiny",
        [tensor("x", "FP32", x, binary=binary_in)],
        outputs=[triton.InferRequestedOutput("scores", binary_data=binary_out)],
        request_id="r-1",
    )
    np.testing.assert_allclose(result.as_numpy("scores"), scores(x), atol=1e-6)
    assert result.get_response()["id"] == "r-1"
    assert result.get_response()["model_version"] == "1.0.0"


def test_without_naming_outputs(client: triton.InferenceServerClient) -> None:
    x = samples(1)
    result = client.infer("tiny", [tensor("x", "FP32", x, binary=True)], model_version="1.0.0")
    np.testing.assert_allclose(result.as_numpy("scores"), scores(x), atol=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_every_datatype_comes_back_as_it_went(client: triton.InferenceServerClient, binary: bool) -> None:
    values = every_kind()
    inputs = [
        tensor(name, datatype, values[name], binary=binary or datatype == "FP16")
        for name, (datatype, _) in KINDS.items()
    ]
    outputs = [
        triton.InferRequestedOutput(f"{name}_out", binary_data=binary or datatype == "FP16")
        for name, (datatype, _) in KINDS.items()
    ]
    result = client.infer("echo", inputs, outputs=outputs)
    for name, sent in values.items():
        got = result.as_numpy(f"{name}_out")
        if name == "text" and not binary:
            got = np.array([str(v).encode() for v in got.ravel()], np.object_).reshape(got.shape)
        assert got.shape == sent.shape
        assert got.tolist() == sent.tolist()


def test_errors_arrive_as_the_clients_own_with_our_sentence(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no input 'image'; it takes x FP32") as refusal:
        client.infer("tiny", [tensor("image", "FP32", samples(1), binary=True)])
    assert refusal.value.status() == "400"
    with pytest.raises(InferenceServerException, match="no model 'absent'"):
        client.infer("absent", [tensor("x", "FP32", samples(1), binary=True)])
    with pytest.raises(InferenceServerException, match="control process alone"):
        client.load_model("tiny")
    with pytest.raises(InferenceServerException, match="control process alone"):
        client.unload_model("tiny")


def test_compressed_requests_are_refused_clearly(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="send it without Content-Encoding"):
        client.infer(
            "tiny", [tensor("x", "FP32", samples(1), binary=True)], request_compression_algorithm="gzip"
        )
