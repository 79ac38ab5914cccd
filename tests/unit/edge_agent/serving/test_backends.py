"""Every installed runtime behind the one interface, on the same net."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edge_agent import facts
from edge_agent.serving.backends import tflite
from edge_agent.serving.backends.base import Loaded, Spec, open_model
from edge_contract.errors import BundleRejected, DeviceUnfit, Reason, RequestRejected
from edge_contract.manifest import Runtime, Tensor
from tests.support.models import ABOVE, identity_net, samples, scores, tiny_net
from tests.support.tflite import tiny_tflite

BUILDERS = {"onnxruntime": tiny_net, "tflite": tiny_tflite}
INSTALLED = [runtime for runtime in BUILDERS if runtime in facts.probe().runtimes]


def opened(
    folder: Path, runtime: Runtime, data: bytes, threads: int = 1, *, spinning: bool = False
) -> Loaded:
    path = folder / f"model.{'onnx' if runtime == 'onnxruntime' else 'tflite'}"
    path.write_bytes(data)
    return open_model(Spec(path, runtime, threads, spinning))


@pytest.fixture(params=INSTALLED)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    found: Runtime = request.param
    return found


def test_the_interface_is_read_from_the_model(tmp_path: Path, runtime: Runtime) -> None:
    model = opened(tmp_path, runtime, BUILDERS[runtime]())
    assert model.inputs == [Tensor("x", "FP32", [-1, 8])]
    assert model.outputs == [Tensor("scores", "FP32", [-1, 4])]


def test_batches_of_any_size_in_any_order(tmp_path: Path, runtime: Runtime) -> None:
    model = opened(tmp_path, runtime, BUILDERS[runtime]())
    for count in (1, 5, 2, 1):
        x = samples(count)
        np.testing.assert_allclose(model.run({"x": x})["scores"], scores(x), atol=1e-6)


@pytest.mark.parametrize(("threads", "spinning"), [(2, False), (2, True)])
def test_threads(tmp_path: Path, runtime: Runtime, threads: int, spinning: bool) -> None:
    model = opened(tmp_path, runtime, BUILDERS[runtime](), threads, spinning=spinning)
    np.testing.assert_allclose(model.run({"x": samples(3)})["scores"], scores(samples(3)), atol=1e-6)


def test_concurrent_runs_do_not_mix(tmp_path: Path, runtime: Runtime) -> None:
    model = opened(tmp_path, runtime, BUILDERS[runtime]())
    wrong: list[int] = []

    def work(seed: int) -> None:
        x = samples(1 + seed, seed=seed)
        for _ in range(200):
            if not np.allclose(model.run({"x": x})["scores"], scores(x), atol=1e-6):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_answers_are_copies(tmp_path: Path, runtime: Runtime) -> None:
    model = opened(tmp_path, runtime, BUILDERS[runtime]())
    first = model.run({"x": samples(1)})["scores"]
    kept = first.copy()
    model.run({"x": samples(1, seed=99)})
    np.testing.assert_array_equal(first, kept)


def test_a_run_that_fails_leaves_the_model_usable(tmp_path: Path, runtime: Runtime) -> None:
    model = opened(tmp_path, runtime, BUILDERS[runtime]())
    with pytest.raises(RequestRejected) as refusal:
        model.run({"x": np.zeros((1, 9), np.float32)})
    assert (refusal.value.status, refusal.value.reason) == (500, Reason.INFERENCE_FAILED)
    assert "\n" not in refusal.value.what
    np.testing.assert_allclose(model.run({"x": samples(1)})["scores"], scores(samples(1)), atol=1e-6)


def test_a_closed_model_refuses(tmp_path: Path, runtime: Runtime) -> None:
    model = opened(tmp_path, runtime, BUILDERS[runtime]())
    model.close()
    with pytest.raises(RequestRejected):
        model.run({"x": samples(1)})


@pytest.mark.parametrize("fault", ["empty", "text", "cut"])
def test_files_that_are_no_model(tmp_path: Path, runtime: Runtime, fault: str) -> None:
    whole = BUILDERS[runtime]()
    data = {"empty": b"", "text": b"not a model" * 50, "cut": whole[: len(whole) // 3]}[fault]
    with pytest.raises(BundleRejected) as refusal:
        opened(tmp_path, runtime, data)
    assert refusal.value.reason is Reason.LOAD_FAILED
    assert "model." in refusal.value.what
    assert "\n" not in str(refusal.value)


def test_a_missing_file(tmp_path: Path, runtime: Runtime) -> None:
    with pytest.raises(BundleRejected, match=r"absent.*does not load"):
        open_model(Spec(tmp_path / "absent", runtime))


def test_an_onnx_operator_that_fails_on_some_values(tmp_path: Path) -> None:
    model = opened(tmp_path, "onnxruntime", tiny_net(fault="error_above"))
    x = samples(1)
    assert model.run({"x": x})["scores"].shape == (1, 4)
    x[0, 0] = ABOVE
    with pytest.raises(RequestRejected, match=r"onnxruntime: INVALID_ARGUMENT: .*out of data bounds"):
        model.run({"x": x})


def test_text_and_half_precision_in_onnx(tmp_path: Path) -> None:
    net = identity_net({"s": ("BYTES", [-1]), "h": ("FP16", [-1, 2]), "n": ("INT64", [])})
    model = opened(tmp_path, "onnxruntime", net)
    assert [t.datatype for t in model.inputs] == ["BYTES", "FP16", "INT64"]
    words = np.array(["ä".encode(), b""], np.object_)
    half = np.ones((1, 2), np.float16)
    results = model.run({"s": words, "h": half, "n": np.array(3)})
    assert results["s_out"].tolist() == words.tolist()
    assert results["h_out"].dtype == np.float16
    assert results["n_out"].shape == ()
    with pytest.raises(RequestRejected, match="tensor 's': an element is not UTF-8") as refusal:
        model.run({"s": np.array([b"\xff"], np.object_), "h": half, "n": np.array(3)})
    assert refusal.value.status == 400


def test_without_a_tflite_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite, "_PACKAGES", ("no_such_package.interpreter",))
    with pytest.raises(DeviceUnfit) as refusal:
        opened(tmp_path, "tflite", tiny_tflite())
    assert refusal.value.reason is Reason.RUNTIME_MISSING
    assert "edgeward[tflite]" in refusal.value.next_step


def test_loading_and_running_writes_nothing_to_the_home_folder(tmp_path: Path) -> None:
    """onnxruntime would make a device id and a database there, and upload from it."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "model.onnx").write_bytes(tiny_net())
    code = (
        "import sys, numpy, pathlib\n"
        "from edge_agent.serving.backends.base import Spec, open_model\n"
        "model = open_model(Spec(pathlib.Path(sys.argv[1]), 'onnxruntime'))\n"
        "print(model.run({'x': numpy.zeros((1, 8), numpy.float32)})['scores'].shape)\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_"))}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(tmp_path / "model.onnx")],
        env={**kept, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[4])},
        capture_output=True,
        text=True,
        cwd=home,
        timeout=60,
        check=True,
    )
    assert done.stdout == "(1, 4)\n"
    assert done.stderr == ""
    assert list(home.rglob("*")) == []
