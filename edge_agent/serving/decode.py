"""Pure: decoding Open Inference Protocol v2 requests, JSON and the binary tensor extension.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/binary_tensor_data.md

Strict: what the protocol does not allow is refused with the tensor's name and what was expected.
Parameters are the protocol's place for extras, so unknown ones are ignored, except those that ask for
something this server does not do (shared memory, sequences, classification).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np

from edge_agent.serving.codec import BYTES_LENGTH, Request, reject
from edge_agent.serving.tensors import NUMPY, Array, admits, describe, describe_all, elements
from edge_contract.errors import Reason
from edge_contract.manifest import Tensor

_NESTED = re.compile(rb"\s*\[\s*\[")
_UNSUPPORTED = frozenset(
    {
        "shared_memory_region",
        "shared_memory_byte_size",
        "shared_memory_offset",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "classification",
    }
)
_JSON_TYPES: dict[str, type] = {"b": bool, "i": int, "u": int, "f": float, "O": str}


class _Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw(b"")


class _Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    parameters: dict[str, Any] = {}


class _Infer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    inputs: list[_Input]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[_Output] | None = None


_REQUEST = msgspec.json.Decoder(_Infer)


def decode(
    body: bytes, header_length: int | None, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> Request:
    """Decode and check a request against the model's tensors.

    `header_length` is the value of `Inference-Header-Content-Length`, if the client sent it.
    Raises RequestRejected (400).
    """
    if header_length is not None and not 0 < header_length <= len(body):
        reject(
            f"the header says {header_length} bytes of JSON, the body has {len(body)}",
            "set Inference-Header-Content-Length to the length of the JSON part",
            reason=Reason.BAD_INPUT,
        )
    request = _parse(memoryview(body)[:header_length])
    _check_parameters("the request", request.parameters)
    blobs = _Blobs(memoryview(body)[header_length:] if header_length is not None else None)
    arrays = _inputs(request.inputs, inputs, blobs)
    blobs.check_used()
    return Request(request.id, arrays, _wanted(request, outputs))


def _parse(header: memoryview) -> _Infer:
    try:
        return _REQUEST.decode(header)
    except msgspec.ValidationError as e:
        reject(f"the request is not an inference request: {e}", "follow the Open Inference Protocol v2")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        reject(
            f"the request is not JSON: {e}",
            "send a JSON body; with binary tensors, set Inference-Header-Content-Length",
            reason=Reason.BAD_INPUT,
        )


def _check_parameters(where: str, parameters: Mapping[str, Any]) -> None:
    for name in parameters:
        if name in _UNSUPPORTED:
            reject(f"{where} has the parameter {name!r}, which is not supported here", f"leave {name} out")


class _Blobs:
    """The binary part of a body, handed out in the order of the inputs."""

    def __init__(self, data: memoryview | None) -> None:
        self._data = data
        self._used = 0

    def take(self, name: str, size: int) -> memoryview:
        if self._data is None:
            reject(
                f"tensor {name!r} says its data is binary, but the body has no binary part",
                "set Inference-Header-Content-Length to the length of the JSON part",
            )
        left = len(self._data) - self._used
        if not 0 <= size <= left:
            reject(
                f"tensor {name!r} announces {size} bytes, the body has {left} left",
                "send the tensors' bytes one after the other, in the order of the inputs",
            )
        self._used += size
        return self._data[self._used - size : self._used]

    def check_used(self) -> None:
        left = len(self._data) - self._used if self._data is not None else 0
        if left:
            reject(
                f"the body has {left} bytes more than its tensors announce",
                "make the binary_data_size of the inputs add up to the binary part",
            )


def _inputs(given: Sequence[_Input], expected: Sequence[Tensor], blobs: _Blobs) -> dict[str, Array]:
    by_name = {t.name: t for t in expected}
    arrays: dict[str, Array] = {}
    for item in given:
        tensor = by_name.get(item.name)
        if tensor is None:
            reject(
                f"the model has no input {item.name!r}; it takes {describe_all(expected)}",
                "name the model's inputs",
            )
        if item.name in arrays:
            reject(f"the input {item.name!r} is given twice", "give each input once")
        _check_declaration(item, tensor)
        arrays[item.name] = _array(item, tensor, blobs)
    missing = [t for t in expected if t.name not in arrays]
    if missing:
        reject(f"the input {describe(missing[0])} is missing", "give every input of the model")
    return arrays


def _check_declaration(item: _Input, tensor: Tensor) -> None:
    if item.datatype != tensor.datatype:
        reject(
            f"tensor {item.name!r} is declared {item.datatype}, the model takes {describe(tensor)}",
            f"send {tensor.datatype}",
        )
    if not admits(tensor.shape, item.shape):
        reject(
            f"tensor {item.name!r} has the shape {item.shape}, the model takes {describe(tensor)}",
            "send that shape; -1 stands for any extent of 1 or more",
        )
    _check_parameters(f"tensor {item.name!r}", item.parameters)


def _array(item: _Input, tensor: Tensor, blobs: _Blobs) -> Array:
    size = item.parameters.get("binary_data_size")
    if (size is None) == (not item.data):
        reject(
            f"tensor {item.name!r} needs either data or the parameter binary_data_size, not both",
            "send its values as JSON data or as binary data",
        )
    if size is not None:
        if type(size) is not int:
            reject(f"tensor {item.name!r}: binary_data_size is not an integer", "give a number of bytes")
        return _from_binary(tensor, item.shape, blobs.take(item.name, size))
    return _from_json(tensor, item.shape, item.data)


def _from_binary(tensor: Tensor, shape: list[int], data: memoryview) -> Array:
    if tensor.datatype == "BYTES":
        return _bytes_elements(tensor, shape, data)
    dtype = NUMPY[tensor.datatype]
    expected = elements(shape) * dtype.itemsize
    if len(data) != expected:
        reject(
            f"tensor {tensor.name!r} of shape {shape} and type {tensor.datatype} has {len(data)} bytes of "
            f"data, {expected} were expected",
            "send the elements in row-major order, little-endian, without padding",
        )
    if tensor.datatype == "BOOL" and expected and np.frombuffer(data, np.uint8).max() > 1:
        reject(f"tensor {tensor.name!r}: a BOOL is neither 0 nor 1", "send one byte, 0 or 1, per element")
    array = np.frombuffer(data, dtype).reshape(shape)
    # The JSON part has any length, so the data may start anywhere; kernels want it aligned.
    return array if array.flags.aligned else array.copy()


def _bytes_elements(tensor: Tensor, shape: list[int], data: memoryview) -> Array:
    values: list[bytes] = []
    at = 0
    while at < len(data):
        end = at + BYTES_LENGTH.size
        size = BYTES_LENGTH.unpack_from(data, at)[0] if end <= len(data) else len(data)
        if end + size > len(data):
            reject(
                f"tensor {tensor.name!r}: element {len(values)} runs past the end of the tensor's data",
                "precede each element by its length, 4 bytes little-endian",
            )
        values.append(bytes(data[end : end + size]))
        at = end + size
    return _objects(tensor, shape, values)


def _objects(tensor: Tensor, shape: list[int], values: Sequence[Any]) -> Array:
    _check_count(tensor, shape, len(values))
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array.reshape(shape)


def _from_json(tensor: Tensor, shape: list[int], raw: msgspec.Raw) -> Array:
    if tensor.datatype == "FP16":
        reject(
            f"tensor {tensor.name!r} is FP16, which JSON has no form for",
            "send it as binary data, with the parameter binary_data_size",
        )
    nested = _NESTED.match(raw) is not None
    kind = _JSON_TYPES[NUMPY[tensor.datatype].kind]
    try:
        values = _data_decoder(kind, len(shape) if nested else 1).decode(raw)
    except (msgspec.DecodeError, RecursionError) as e:
        reject(
            f"tensor {tensor.name!r}: its data are not {tensor.datatype} values: {e}",
            f"send a flat array of {elements(shape)} values, or arrays nested like the shape {shape}",
        )
    if nested:
        values = _flatten(tensor, shape, values)
    if tensor.datatype == "BYTES":
        return _objects(tensor, shape, [v.encode() for v in values])
    _check_count(tensor, shape, len(values))
    return _numbers(tensor, values).reshape(shape)


@cache
def _data_decoder(kind: type, depth: int) -> msgspec.json.Decoder[Any]:
    """Decoder of lists of `kind`, `depth` deep."""
    shape: Any = kind
    for _ in range(depth):
        shape = list[shape]
    return msgspec.json.Decoder(shape)


def _flatten(tensor: Tensor, shape: list[int], values: list[Any]) -> list[Any]:
    lengths_agree = len(values) == shape[0]
    for extent in shape[1:]:
        lengths_agree = lengths_agree and all(len(v) == extent for v in values)
        values = [x for v in values for x in v]
    if not lengths_agree:
        reject(
            f"tensor {tensor.name!r}: its nested data do not have the shape {shape}",
            "send a flat array, or arrays nested like the shape",
        )
    return values


def _numbers(tensor: Tensor, values: list[Any]) -> Array:
    dtype = NUMPY[tensor.datatype]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if values and (min(values) < limits.min or max(values) > limits.max):
            reject(
                f"tensor {tensor.name!r}: a value is outside {tensor.datatype}",
                f"send integers from {limits.min} to {limits.max}",
            )
        return np.array(values, dtype)
    with np.errstate(over="ignore"):
        array = np.array(values, dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        reject(f"tensor {tensor.name!r}: a value is outside {tensor.datatype}", "send finite values")
    return array


def _check_count(tensor: Tensor, shape: list[int], count: int) -> None:
    if count != elements(shape):
        reject(
            f"tensor {tensor.name!r} has {count} elements, its shape {shape} needs {elements(shape)}",
            "make shape and data agree",
        )


def _wanted(request: _Infer, outputs: Sequence[Tensor]) -> dict[str, bool]:
    binary = _flag("the request", request.parameters, "binary_data_output", default=False)
    by_name = {t.name: t for t in outputs}
    wanted: dict[str, bool] = {}
    for item in request.outputs or [_Output(t.name) for t in outputs]:
        tensor = by_name.get(item.name)
        if tensor is None:
            reject(
                f"the model has no output {item.name!r}; it gives {describe_all(outputs)}",
                "name the model's outputs",
            )
        if item.name in wanted:
            reject(f"the output {item.name!r} is asked for twice", "ask for each output once")
        _check_parameters(f"output {item.name!r}", item.parameters)
        wanted[item.name] = _flag(f"output {item.name!r}", item.parameters, "binary_data", default=binary)
        if tensor.datatype == "FP16" and not wanted[item.name]:
            reject(
                f"output {item.name!r} is FP16, which JSON has no form for",
                "ask for binary data, with the parameter binary_data",
            )
    return wanted


def _flag(where: str, parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        reject(f"{where}: the parameter {name} is not true or false", "send true or false")
    return value
