"""The standard net of tests/support/models.py as a TFLite file, built with flatbuffers alone.

Field numbers are those of TensorFlow Lite's schema (tensorflow/compiler/mlir/lite/schema/schema.fbs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flatbuffers
import numpy as np

from tests.support.models import Array, weights_of

_FLOAT32 = 0
_FULLY_CONNECTED, _FULLY_CONNECTED_OPTIONS = 9, 8
_SOFTMAX, _SOFTMAX_OPTIONS = 25, 9


def tiny_tflite(*, classes: int = 4, features: int = 8, seed: int = 0, batch: int = -1) -> bytes:
    """`scores = softmax(x @ W + b)`; `batch` -1 declares the batch dimension free, else fixes it."""
    weights, bias = weights_of(classes, features, seed)
    rows = max(1, batch)
    b = flatbuffers.Builder(4096)
    buffers = [_table(b, 1)] + [_buffer(b, data) for data in (weights.T, bias)]
    tensors = [
        _tensor(b, "x", [rows, features], 0, [batch, features]),
        _tensor(b, "W", [classes, features], 1),
        _tensor(b, "b", [classes], 2),
        _tensor(b, "logits", [rows, classes], 0, [batch, classes]),
        _tensor(b, "scores", [rows, classes], 0, [batch, classes]),
    ]
    operators = [
        _operator(b, 0, [0, 1, 2], [3], _FULLY_CONNECTED_OPTIONS, _table(b, 3)),
        _operator(b, 1, [3], [4], _SOFTMAX_OPTIONS, _table(b, 1, lambda: b.PrependFloat32Slot(0, 1.0, 0.0))),
    ]
    graph = _subgraph(b, tensors, [0], [4], operators)
    codes = [_operator_code(b, code) for code in (_FULLY_CONNECTED, _SOFTMAX)]
    b.Finish(_model(b, codes, graph, buffers), b"TFL3")
    return bytes(b.Output())


def _table(b: flatbuffers.Builder, fields: int, fill: Callable[[], None] | None = None) -> int:
    b.StartObject(fields)
    if fill is not None:
        fill()
    offset: int = b.EndObject()
    return offset


def _buffer(b: flatbuffers.Builder, array: Array) -> int:
    data = np.ascontiguousarray(array, np.float32).tobytes()
    b.StartVector(1, len(data), 16)
    b.head -= len(data)
    b.Bytes[b.head : b.head + len(data)] = data
    vector = b.EndVector()
    return _table(b, 1, lambda: b.PrependUOffsetTRelativeSlot(0, vector, 0))


def _ints(b: flatbuffers.Builder, values: Sequence[int]) -> int:
    vector: int = b.CreateNumpyVector(np.array(values, np.int32))
    return vector


def _offsets(b: flatbuffers.Builder, values: Sequence[int]) -> int:
    b.StartVector(4, len(values), 4)
    for value in reversed(values):
        b.PrependUOffsetTRelative(value)
    vector: int = b.EndVector()
    return vector


def _tensor(
    b: flatbuffers.Builder, name: str, shape: list[int], buffer: int, signature: list[int] | None = None
) -> int:
    text, extents = b.CreateString(name), _ints(b, shape)
    declared = _ints(b, signature) if signature else 0

    def fill() -> None:
        b.PrependUOffsetTRelativeSlot(0, extents, 0)
        b.PrependInt8Slot(1, _FLOAT32, 0)
        b.PrependUint32Slot(2, buffer, 0)
        b.PrependUOffsetTRelativeSlot(3, text, 0)
        if declared:
            b.PrependUOffsetTRelativeSlot(7, declared, 0)

    return _table(b, 8, fill)


def _operator(
    b: flatbuffers.Builder, code: int, inputs: list[int], outputs: list[int], kind: int, options: int
) -> int:
    taken, given = _ints(b, inputs), _ints(b, outputs)

    def fill() -> None:
        b.PrependUint32Slot(0, code, 0)
        b.PrependUOffsetTRelativeSlot(1, taken, 0)
        b.PrependUOffsetTRelativeSlot(2, given, 0)
        b.PrependUint8Slot(3, kind, 0)
        b.PrependUOffsetTRelativeSlot(4, options, 0)

    return _table(b, 5, fill)


def _subgraph(
    b: flatbuffers.Builder, tensors: list[int], inputs: list[int], outputs: list[int], operators: list[int]
) -> int:
    vectors = [_offsets(b, tensors), _ints(b, inputs), _ints(b, outputs), _offsets(b, operators)]

    def fill() -> None:
        for slot, vector in enumerate(vectors):
            b.PrependUOffsetTRelativeSlot(slot, vector, 0)

    return _table(b, 4, fill)


def _operator_code(b: flatbuffers.Builder, code: int) -> int:
    def fill() -> None:
        b.PrependInt8Slot(0, code, 0)
        b.PrependInt32Slot(2, 1, 0)
        b.PrependInt32Slot(3, code, 0)

    return _table(b, 4, fill)


def _model(b: flatbuffers.Builder, codes: list[int], graph: int, buffers: list[int]) -> int:
    vectors = {1: _offsets(b, codes), 2: _offsets(b, [graph]), 4: _offsets(b, buffers)}

    def fill() -> None:
        b.PrependUint32Slot(0, 3, 0)
        for slot, vector in vectors.items():
            b.PrependUOffsetTRelativeSlot(slot, vector, 0)

    return _table(b, 5, fill)
