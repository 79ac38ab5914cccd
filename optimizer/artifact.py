"""The model as the user gave it: opened strictly, described, never run here.

Running it, even once, happens in a child process (worker.py): a bad file may crash the runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edge_contract import canonical
from edge_contract.errors import InputRejected, Reason
from edge_contract.manifest import Datatype, Runtime, Tensor
from optimizer.recipes import ModelFacts
from optimizer.text import first_line

# Protocol buffers end at 2 GiB; onnxruntime's quantizers need a second copy below it.
LIMIT_BYTES = 1 << 31
_TFLITE_MAGIC = b"TFL3"
_QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
)
_DATATYPES: dict[int, Datatype] = {
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.UINT16: "UINT16",
    onnx.TensorProto.UINT32: "UINT32",
    onnx.TensorProto.UINT64: "UINT64",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.INT16: "INT16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.DOUBLE: "FP64",
}
# Open Inference Protocol datatype → numpy's name of it.
NUMPY_NAMES: dict[Datatype, str] = {
    **{kind: kind.lower() for kind in _DATATYPES.values() if not kind.startswith("FP")},
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened model. `batch` is the fixed first dimension of the inputs, None where it is free."""

    path: Path
    sha256: str
    size_bytes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batch: int | None
    facts: ModelFacts


def open_model(path: Path, runtime: Runtime) -> Artifact:
    """Read and check the model at `path` for a device that runs `runtime`.

    Raises InputRejected: unreadable, or a kind of model this release does not optimize.
    """
    data = _read(path)
    _check_format(path, data, runtime)
    model = _parse(path, data)
    graph = model.graph
    weights = {t.name for t in graph.initializer}
    inputs = tuple(_tensor(path, v) for v in graph.input if v.name not in weights)
    outputs = tuple(_tensor(path, v) for v in graph.output)
    return Artifact(
        path=path,
        sha256=canonical.sha256_hex(data),
        size_bytes=len(data),
        inputs=inputs,
        outputs=outputs,
        batch=_batch(path, inputs),
        facts=describe(model),
    )


def describe(model: onnx.ModelProto) -> ModelFacts:
    """The facts of a model in memory."""
    ops: dict[str, int] = {}
    for node in nodes(model.graph):
        ops[node.op_type] = ops.get(node.op_type, 0) + 1
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    sizes = (_count(t.dims) for t in model.graph.initializer)
    return ModelFacts(
        opset=opset(model),
        ops=dict(sorted(ops.items())),
        parameters=sum(sizes),
        quantized=any(op in _QUANTIZED_OPS for op in ops),
        half=half,
    )


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of `graph` and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)
            for inner in attribute.graphs:
                yield from nodes(inner)


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operator set."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputRejected(
            Reason.MODEL_UNREADABLE, f"{path} is not a file", "give the path of an .onnx file that exists"
        )
    size = path.stat().st_size
    if size >= LIMIT_BYTES:
        raise _unsupported(
            path, f"has {size} bytes, over the limit of {LIMIT_BYTES}", "split it or make it smaller"
        )
    return path.read_bytes()


def _check_format(path: Path, data: bytes, runtime: Runtime) -> None:
    if data[4:8] == _TFLITE_MAGIC:
        raise _unsupported(
            path,
            f"is a TFLite model; a profile with the runtime {runtime} was given"
            if runtime != "tflite"
            else "is a TFLite model, and this release optimizes ONNX models only",
            "give the .onnx file it was converted from, with a profile whose runtime is onnxruntime",
        )
    if runtime == "tflite":
        raise _unsupported(
            path,
            "is not a TFLite model, and the profile's runtime is tflite",
            "use a profile whose runtime is onnxruntime; this release does not convert ONNX to TFLite",
        )


def _parse(path: Path, data: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_from_string(data)
    except DecodeError as e:
        raise _unreadable(path, "is not an ONNX model, or is cut short") from e
    _check_self_contained(path, model)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as e:
        raise _unreadable(path, f"is not a valid ONNX model: {first_line(e)}") from e
    if not model.graph.node or not model.graph.output:
        raise _unreadable(path, "is not a valid ONNX model: it has no nodes or no outputs")
    return model


def _check_self_contained(path: Path, model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = next((e.value for e in tensor.external_data if e.key == "location"), "another file")
            raise _unsupported(
                path,
                f"keeps the weights {tensor.name!r} outside of itself, in {where}",
                "save it as one file: onnx.save(onnx.load(path), new_path)",
            )


def _tensor(path: Path, value: onnx.ValueInfoProto) -> Tensor:
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value") or "no type"
        raise _unsupported(path, f"has {value.name!r}, which is no tensor ({kind})", "export tensors only")
    datatype = _DATATYPES.get(value.type.tensor_type.elem_type)
    if datatype is None:
        name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        raise _unsupported(
            path, f"has {value.name!r} of type {name}", f"export it with one of {', '.join(NUMPY_NAMES)}"
        )
    dims = value.type.tensor_type.shape.dim
    shape = [int(d.dim_value) if d.HasField("dim_value") else -1 for d in dims]
    return Tensor(value.name, datatype, shape)


def _batch(path: Path, inputs: tuple[Tensor, ...]) -> int | None:
    """The first dimension all inputs share, None if it is free."""
    if not inputs:
        raise _unsupported(path, "has no inputs", "export the model with its inputs")
    for tensor in inputs:
        if not tensor.shape or 0 in tensor.shape:
            raise _unsupported(
                path,
                f"has the input {tensor.name!r} of shape {tensor.shape}",
                "export it with a batch dimension first and no dimension of zero",
            )
    firsts = {tensor.shape[0] for tensor in inputs}
    if len(firsts) > 1:
        raise _unsupported(
            path,
            f"has inputs whose first dimensions differ ({', '.join(map(str, sorted(firsts)))})",
            "export it with one batch dimension, the first of every input",
        )
    first = firsts.pop()
    return None if first == -1 else first


def _count(dims: Iterable[int]) -> int:
    total = 1
    for dim in dims:
        total *= int(dim)
    return total


def _unreadable(path: Path, problem: str) -> InputRejected:
    return InputRejected(
        Reason.MODEL_UNREADABLE, f"{path} {problem}", "export or download the model again and retry"
    )


def _unsupported(path: Path, problem: str, next_step: str) -> InputRejected:
    return InputRejected(Reason.MODEL_UNSUPPORTED, f"{path} {problem}", next_step)
