"""Tasks in processes of their own, and how those may end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_contract.errors import Reason
from edge_contract.manifest import Tensor
from optimizer import evaluate
from optimizer.child import Children
from optimizer.evaluate import Inference
from optimizer.recipes import DynamicInt8, Fp16, Fp32, Recipe, StaticInt8
from optimizer.worker import Build, Built, Clean, Cleaned, Fault
from tests.support import models
from tests.unit.optimizer import nets
from tests.unit.optimizer.passes.graphs import model

CHILDREN = Children(60)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    np.save(tmp_path / "image.npy", nets.images(40, seed=5)[0])
    return {"image": str(tmp_path / "image.npy")}


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        ("raise ValueError('no')", Reason.CANDIDATE_CRASHED, "status 1: ValueError: no"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", Reason.CANDIDATE_CRASHED, "by SIGSEGV"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            Reason.CANDIDATE_CRASHED,
            "out of memory?",
        ),
        (
            "import time; print('busy', flush=True); time.sleep(60)",
            Reason.CANDIDATE_HUNG,
            "longer than the 1 s",
        ),
    ],
)
def test_how_a_process_may_end(code: str, reason: Reason, words: str) -> None:
    started = time.monotonic()
    fault = Children(1 if "sleep" in code else 30).execute([sys.executable, "-c", code])
    assert fault is not None
    assert fault.reason is reason
    assert words in fault.what
    assert time.monotonic() - started < 30


def test_a_good_end() -> None:
    assert CHILDREN.execute([sys.executable, "-c", "print('fine')"]) is None


def sleep(_: int) -> object:
    return STOPPED.execute([sys.executable, "-c", "import time; time.sleep(60)"])


STOPPED = Children(60)


def test_an_interruption_ends_the_processes_at_once() -> None:
    started = time.monotonic()
    interrupt = threading.Timer(1.0, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        STOPPED.map(sleep, range(20), lambda _: None)
    interrupt.join()
    assert time.monotonic() - started < 20
    with pytest.raises(RuntimeError, match="after the run had been stopped"):
        sleep(0)


def test_results_come_in_the_order_of_the_items() -> None:
    seen: list[int] = []
    delays = [0.3, 0.0, 0.1]

    def wait(delay: float) -> float:
        time.sleep(delay)
        return delay

    assert Children(60).map(wait, delays, seen.append) == delays
    assert seen == [1, 2, 3]


def test_a_file_in_the_working_directory_does_not_stand_in_for_a_library(
    tmp_path: Path, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    path = nets.save(tmp_path / "m.onnx", nets.classifier())
    assert isinstance(evaluate.infer(CHILDREN, path, inputs, batch=None, singly=False), Inference)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Inference]:
    """A cleaned model, calibration inputs, and what the model as given answers to them."""
    folder = tmp_path_factory.mktemp("cleaned")
    np.save(folder / "image.npy", nets.images(40, seed=5)[0])
    inputs = {"image": str(folder / "image.npy")}
    source = nets.save(folder / "m.onnx", nets.classifier())
    assert isinstance(CHILDREN.run(clean(source, inputs, folder / "clean.onnx", [])), Cleaned)
    want = evaluate.infer(CHILDREN, source, inputs, batch=None, singly=True)
    assert isinstance(want, Inference)
    return folder / "clean.onnx", inputs, want


def clean(path: Path, inputs: dict[str, str], target: Path, crashed: list[str]) -> Clean:
    marker = str(target.with_name("pass"))
    return Clean(str(path), inputs, None, str(target), marker, crashed)


def test_clean_up(tmp_path: Path, inputs: dict[str, str]) -> None:
    path = nets.save(tmp_path / "m.onnx", nets.classifier(opset=11, old_style=True))
    result = CHILDREN.run(clean(path, inputs, tmp_path / "clean.onnx", ["identities removed"]))
    assert isinstance(result, Cleaned)
    found = {p.name: p.status for p in result.passes}
    assert found["opset 17"] == "applied"
    assert found["identities removed"] == "dropped"
    assert (tmp_path / "pass").read_text() == ""
    assert "BatchNormalization" not in [n.op_type for n in onnx.load(tmp_path / "clean.onnx").graph.node]


def test_a_model_that_kills_the_runtime(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(models.tiny_net(fault="crash_at_load"))
    np.save(tmp_path / "x.npy", models.samples(20))
    result = evaluate.infer(CHILDREN, path, {"x": str(tmp_path / "x.npy")}, batch=None, singly=False)
    assert isinstance(result, Fault)
    assert result.reason is Reason.CANDIDATE_CRASHED
    assert signal.SIGFPE.name in result.what


def test_a_model_that_hangs(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(models.tiny_net(fault="hang"))
    np.save(tmp_path / "x.npy", models.samples(20))
    result = evaluate.infer(Children(2), path, {"x": str(tmp_path / "x.npy")}, batch=None, singly=False)
    assert isinstance(result, Fault)
    assert result.reason is Reason.CANDIDATE_HUNG


def test_outputs_that_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(models.tiny_net(fault="non_finite"))
    np.save(tmp_path / "x.npy", models.samples(20))
    result = evaluate.infer(CHILDREN, path, {"x": str(tmp_path / "x.npy")}, batch=None, singly=False)
    assert result == Fault(
        Reason.NON_FINITE_OUTPUT, "output 'scores' is NaN or infinite for 20 of 20 samples"
    )


@pytest.mark.parametrize("batch", [None, 4])
def test_inference(batch: int | None, tmp_path: Path, inputs: dict[str, str]) -> None:
    path = nets.save(tmp_path / "m.onnx", nets.classifier(batch=batch))
    result = evaluate.infer(CHILDREN, path, inputs, batch=batch, singly=batch is None)
    assert isinstance(result, Inference)
    assert result.outputs["logits"].shape == (40, 4)
    assert result.interface.outputs == [Tensor("logits", "FP32", [batch or -1, 4])]


@pytest.mark.parametrize(
    ("settings", "family", "ops"),
    [
        (Fp32(), "fp32", {"Conv"}),
        (Fp16(), "fp16", {"Cast"}),
        (DynamicInt8("uint8", True, False), "dynamic_int8", {"ConvInteger", "MatMulInteger"}),
        (StaticInt8("uint8", "int8", True, False, "minmax"), "static_int8", {"QuantizeLinear"}),
        (StaticInt8("int8", "int8", False, False, "percentile"), "static_int8", {"QuantizeLinear"}),
    ],
)
def test_every_recipe_builds_a_model_that_keeps_its_answers(
    settings: object,
    family: str,
    ops: set[str],
    cleaned: tuple[Path, dict[str, str], Inference],
    tmp_path: Path,
) -> None:
    source, inputs, want = cleaned
    target = tmp_path / "built.onnx"
    recipe = Recipe(family, family, settings)  # type: ignore[arg-type]
    assert CHILDREN.run(Build(str(source), recipe, inputs, None, str(target))) == Built()
    built = onnx.load(target)
    assert ops <= {n.op_type for n in built.graph.node}
    assert not built.metadata_props
    got = evaluate.infer(CHILDREN, target, inputs, batch=None, singly=True)
    assert isinstance(got, Inference)
    assert evaluate.same_interface(want.interface, got.interface)
    agree = want.outputs["logits"].argmax(axis=1) == got.outputs["logits"].argmax(axis=1)
    assert agree.mean() > 0.9


def test_a_quantizer_that_changes_nothing_is_no_candidate(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((20, 4), np.float32))
    given = nets.save(tmp_path / "m.onnx", model("g (float[N,4] x) => (float[N,4] y) { y = Erf(x) }"))
    recipe = Recipe("dynamic_int8", "dynamic_int8", DynamicInt8("int8", True, False))
    task = Build(str(given), recipe, {"x": str(tmp_path / "x.npy")}, None, str(tmp_path / "built.onnx"))
    result = CHILDREN.run(task)
    assert result == Fault(Reason.MODEL_UNSUPPORTED, "the quantizer changed nothing in this model")


def test_other_names_or_types_are_another_interface(tmp_path: Path) -> None:
    def interface(text: str) -> object:
        np.save(tmp_path / "x.npy", np.ones((2, 4), np.float32))
        path = nets.save(tmp_path / "m.onnx", model(text))
        result = evaluate.infer(CHILDREN, path, {"x": str(tmp_path / "x.npy")}, batch=None, singly=False)
        assert isinstance(result, Inference)
        return result.interface

    plain = interface("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    named = interface("g (float[N,4] x) => (float[N,4] z) { z = Relu(x) }")
    typed = interface("g (float[N,4] x) => (float16[N,4] y) { y = Cast <to = 10> (x) }")
    loose = interface("g (float[N,M] x) => (float[N,M] y) { y = Relu(x) }")
    assert not evaluate.same_interface(plain, named)  # type: ignore[arg-type]
    assert not evaluate.same_interface(plain, typed)  # type: ignore[arg-type]
    assert evaluate.same_interface(plain, loose)  # type: ignore[arg-type]


def test_weights_of_a_candidate_are_as_the_recipe_says(tmp_path: Path, inputs: dict[str, str]) -> None:
    source = nets.save(tmp_path / "m.onnx", onnx.shape_inference.infer_shapes(nets.classifier()))
    for per_channel, shape in ((True, (4,)), (False, ())):
        settings = StaticInt8("int8", "int8", per_channel, False, "minmax")
        target = tmp_path / "built.onnx"
        task = Build(str(source), Recipe("s", "static_int8", settings), inputs, None, str(target))
        assert CHILDREN.run(task) == Built()
        scale = next(t for t in onnx.load(target).graph.initializer if t.name == "kernel_scale")
        assert numpy_helper.to_array(scale).shape == shape
