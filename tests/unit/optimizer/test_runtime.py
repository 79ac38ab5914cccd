"""The seam to onnxruntime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_contract.errors import Reason
from edge_contract.manifest import Tensor
from optimizer import runtime
from optimizer.recipes import DynamicInt8, StaticInt8
from optimizer.runtime import Model, RuntimeFault
from tests.unit.optimizer import nets
from tests.unit.optimizer.passes.graphs import model

IMAGE, _ = nets.images(10, seed=3)
STATIC = StaticInt8("uint8", "int8", True, False, "minmax")


def test_interface_and_outputs() -> None:
    loaded = Model(nets.classifier())
    assert loaded.inputs == [Tensor("image", "FP32", [-1, 1, 8, 8])]
    assert loaded.outputs == [Tensor("logits", "FP32", [-1, 4])]
    assert loaded.run({"image": IMAGE})["logits"].shape == (10, 4)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_chunks_do_not_change_the_outputs(chunk: int) -> None:
    whole = Model(nets.classifier()).run({"image": IMAGE})["logits"]
    parts = Model(nets.classifier()).run_all({"image": IMAGE}, chunk, fixed=False)["logits"]
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_a_fixed_batch_is_filled_up_and_the_filling_dropped() -> None:
    whole = Model(nets.classifier()).run({"image": IMAGE})["logits"]
    parts = Model(nets.classifier(batch=4)).run_all({"image": IMAGE}, 4, fixed=True)["logits"]
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "feeds", "reason"),
    [
        (
            "g (float[2] x) => (float[2] y) { y = Relu(x) }",
            {"x": np.ones(3, np.float32)},
            Reason.INFERENCE_FAILED,
        ),
        ("g (float[2] x) => (float[2] y) { y = Relu(x) }", {}, Reason.INFERENCE_FAILED),
    ],
)
def test_what_cannot_run_is_a_fault(text: str, feeds: runtime.Arrays, reason: Reason) -> None:
    with pytest.raises(RuntimeFault) as caught:
        Model(model(text)).run(feeds)
    assert caught.value.reason is reason


def test_what_cannot_load_is_a_fault(tmp_path: Path) -> None:
    unknown = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Thing", ["x"], ["y"], domain="com.other")],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, [2])],
            [onnx.helper.make_tensor_value_info("y", 1, [2])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.other", 1)],
    )
    (tmp_path / "text.onnx").write_text("no model")
    for source in (unknown, tmp_path / "text.onnx", tmp_path / "absent.onnx"):
        with pytest.raises(RuntimeFault) as caught:
            Model(source)
        assert caught.value.reason is Reason.LOAD_FAILED
        assert "\n" not in caught.value.what


def test_an_output_without_the_batch_is_a_fault() -> None:
    given = model("g (float[N,3] x) => (float[1,3] y) { y = ReduceSum <keepdims = 1> (x, a) }",
                  a=numpy_helper.from_array(np.array([0])))  # fmt: skip
    with pytest.raises(RuntimeFault, match="its first dimension is not the batch") as caught:
        Model(given).run_all({"x": np.ones((4, 3), np.float32)}, 4, fixed=False)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_observing_shows_values_inside() -> None:
    given = model("g (float[N] x) => (float[N] y) { a = Neg(x)  y = Relu(a) }")
    x = np.array([1, -2, 3], np.float32)
    (first, second) = runtime.observe(given, ["x", "a", "y"], {"x": x}, 2, fixed=False)
    assert first["a"].tolist() == [-1, 2]
    assert second["y"].tolist() == [0]
    assert [o.name for o in given.graph.output] == ["y"], "the given model is not changed"


def test_static_quantization_uses_the_types_and_ranges(tmp_path: Path) -> None:
    given = onnx.shape_inference.infer_shapes(nets.classifier())
    names = ["image", "conv", "norm", "active", "same", "flat", "logits"]
    settings = StaticInt8("int8", "int8", False, False, "minmax")
    runtime.quantize_static(given, settings, dict.fromkeys(names, (-2.0, 2.0)), tmp_path / "q.onnx")
    quantized = onnx.load(tmp_path / "q.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
    assert weights["image_zero_point"].dtype == np.int8
    assert weights["image_scale"] == pytest.approx(4 / 255)
    assert weights["kernel_quantized"].dtype == np.int8


def test_a_quantizer_that_stumbles_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFault):
        runtime.quantize_static(
            onnx.shape_inference.infer_shapes(nets.classifier()), STATIC, {}, tmp_path / "q.onnx"
        )
    empty = onnx.ModelProto()
    with pytest.raises(RuntimeFault):
        runtime.quantize_dynamic(empty, DynamicInt8("uint8", True, False), tmp_path / "q.onnx")


def test_nothing_is_written_to_the_home_directory(tmp_path: Path) -> None:
    """Some builds of onnxruntime keep a device id there."""
    home = tmp_path / "home"
    home.mkdir()
    path = nets.save(tmp_path / "m.onnx", nets.classifier())
    code = f"from pathlib import Path; from optimizer.runtime import Model; Model(Path({str(path)!r}))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "HOME": str(home)}, timeout=60, check=False
    )
    assert done.returncode == 0
    assert list(home.rglob("*")) == []
