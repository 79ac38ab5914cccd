"""Opening a model strictly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_contract.errors import InputRejected, Reason
from edge_contract.manifest import Tensor
from optimizer import artifact
from tests.unit.optimizer import nets
from tests.unit.optimizer.passes.graphs import model

GOOD = nets.classifier().SerializeToString()


def refused(path: Path, runtime: str = "onnxruntime") -> InputRejected:
    with pytest.raises(InputRejected) as caught:
        artifact.open_model(path, runtime)  # type: ignore[arg-type]
    assert str(path) in caught.value.what
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_good_model(tmp_path: Path) -> None:
    opened = artifact.open_model(nets.save(tmp_path / "m.onnx", nets.classifier()), "onnxruntime")
    assert opened.inputs == (Tensor("image", "FP32", [-1, 1, 8, 8]),)
    assert opened.outputs == (Tensor("logits", "FP32", [-1, 4]),)
    assert opened.batch is None
    assert opened.size_bytes == len(GOOD)
    assert opened.facts.opset == 17
    assert opened.facts.ops["Conv"] == 1
    assert opened.facts.parameters == 4 * 9 + 4 * 4 + 256 * 4 + 4
    assert not opened.facts.quantized


def test_a_fixed_batch_and_weights_that_are_inputs(tmp_path: Path) -> None:
    net = nets.classifier(batch=4, opset=11, old_style=True)
    opened = artifact.open_model(nets.save(tmp_path / "m.onnx", net), "onnxruntime")
    assert opened.batch == 4
    assert [t.name for t in opened.inputs] == ["image"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is not a model\n" * 100,
        bytes(range(256)) * 20,
        GOOD[: len(GOOD) // 2],
        GOOD[:40],
        GOOD[:200] + bytes(100) + GOOD[300:],
    ],
    ids=["empty", "text", "binary", "half", "head", "overwritten"],
)
def test_what_is_no_whole_model_is_unreadable(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert refused(path).reason is Reason.MODEL_UNREADABLE


@pytest.mark.parametrize("cut", range(1, 60))
def test_no_truncation_passes(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(GOOD[: len(GOOD) * cut // 60])
    assert refused(path).reason is Reason.MODEL_UNREADABLE


def test_a_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent.onnx").reason is Reason.MODEL_UNREADABLE
    assert refused(tmp_path).reason is Reason.MODEL_UNREADABLE


def test_a_file_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with path.open("wb") as target:
        target.truncate(artifact.LIMIT_BYTES)  # sparse: it takes no space
    assert refused(path).reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize(
    ("runtime", "content", "words"),
    [
        (
            "onnxruntime",
            b"\x1c\0\0\0TFL3" + bytes(64),
            "is a TFLite model; a profile with the runtime onnxruntime",
        ),
        ("tflite", b"\x1c\0\0\0TFL3" + bytes(64), "this release optimizes ONNX models only"),
        ("tflite", GOOD, "the profile's runtime is tflite"),
    ],
)
def test_a_format_that_the_profile_does_not_run(
    runtime: str, content: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.write_bytes(content)
    error = refused(path, runtime)
    assert error.reason is Reason.MODEL_UNSUPPORTED
    assert words in error.what
    assert "onnxruntime" in error.next_step


def external() -> onnx.ModelProto:
    net = nets.classifier()
    tensor = next(t for t in net.graph.initializer if t.name == "out_weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return net


def without_inputs() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones(2, np.float32), "w")
    return model("g () => (float[2] y) { y = Relu(w) }", w=weight)


def with_sequence() -> onnx.ModelProto:
    return model("g (seq(float[N]) x) => (float[M] y) { y = ConcatFromSequence <axis = 0> (x) }")


def with_strings() -> onnx.ModelProto:
    return model("g (string[N] x) => (string[N] y) { y = Identity(x) }")


def with_scalar() -> onnx.ModelProto:
    return model("g (float x) => (float y) { y = Relu(x) }")


def with_zero() -> onnx.ModelProto:
    return model("g (float[N,0] x) => (float[N,0] y) { y = Relu(x) }")


def with_two_batches() -> onnx.ModelProto:
    return model("g (float[2,3] x, float[4,3] z) => (float[2,3] y) { a = ReduceSum(z)  y = Add(x, a) }")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (external, "'out_weight' outside of itself, in weights.bin"),
        (without_inputs, "has no inputs"),
        (with_sequence, "'x', which is no tensor (sequence_type)"),
        (with_strings, "'x' of type STRING"),
        (with_scalar, "'x' of shape []"),
        (with_zero, "'x' of shape [-1, 0]"),
        (with_two_batches, "first dimensions differ (2, 4)"),
    ],
)
def test_kinds_of_models_that_are_not_optimized(
    build: Callable[[], onnx.ModelProto], words: str, tmp_path: Path
) -> None:
    error = refused(nets.save(tmp_path / "m.onnx", build()))
    assert error.reason is Reason.MODEL_UNSUPPORTED
    assert words in error.what


def test_a_graph_that_breaks_the_rules(tmp_path: Path) -> None:
    net = nets.classifier()
    net.graph.node[0].input[0] = "nowhere"
    error = refused(nets.save(tmp_path / "m.onnx", net))
    assert error.reason is Reason.MODEL_UNREADABLE
    assert "nowhere" in error.what


def test_facts_look_into_branches() -> None:
    text = """
    g (float[2] x, bool c) => (float[2] y) {
      y = If (c) <then_branch = t () => (float[2] a) { a = Neg(x) },
                  else_branch = e () => (float[2] b) { b = Abs(x) }>
    }"""
    assert artifact.describe(model(text)).ops == {"Abs": 1, "If": 1, "Neg": 1}


def test_facts_of_quantized_and_half_models() -> None:
    quantized = model(
        "g (float[N] x) => (uint8[N] y) { y = QuantizeLinear(x, s, z) }",
        s=numpy_helper.from_array(np.float32(0.1)),
        z=numpy_helper.from_array(np.uint8(3)),
    )
    assert artifact.describe(quantized).quantized
    half = helper.make_graph([], "g", [], [], [numpy_helper.from_array(np.ones(2, np.float16), "w")])
    assert artifact.describe(helper.make_model(half)).half
