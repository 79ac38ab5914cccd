"""Pure: encoding Open Inference Protocol v2 responses, JSON and the binary tensor extension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from edge_agent.serving.codec import BYTES_LENGTH, Encoded, Request, reject
from edge_agent.serving.tensors import NUMPY, Array, describe
from edge_contract.errors import Reason, RequestRejected
from edge_contract.manifest import Tensor


class _OutTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


class _Response(msgspec.Struct, frozen=True, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_OutTensor]
    id: str | None = None


_ENCODER = msgspec.json.Encoder()


def encode(
    model: str, version: str, request: Request, results: Mapping[str, Array], outputs: Sequence[Tensor]
) -> Encoded:
    """Encode the wanted outputs, in the order wanted.

    Raises RequestRejected when the model's answer is not what it promised, or JSON cannot carry it.
    """
    by_name = {t.name: t for t in outputs}
    tensors: list[_OutTensor] = []
    blobs: list[bytes] = []
    for name, binary in request.wanted.items():
        array = _checked(by_name[name], results[name])
        parameters, data = None, None
        if binary:
            blobs.append(_to_binary(by_name[name], array))
            parameters = {"binary_data_size": len(blobs[-1])}
        else:
            data = _to_json(by_name[name], array)
        tensors.append(_OutTensor(name, by_name[name].datatype, list(array.shape), parameters, data))
    header = _ENCODER.encode(_Response(model, version, tensors, request.id))
    if not blobs:
        return Encoded(header, None)
    return Encoded(b"".join([header, *blobs]), len(header))


def _checked(tensor: Tensor, array: Array) -> Array:
    if array.dtype != NUMPY[tensor.datatype] or len(array.shape) != len(tensor.shape):
        raise RequestRejected(
            500,
            Reason.INFERENCE_FAILED,
            f"the model answered {array.dtype} {list(array.shape)} where it promises {describe(tensor)}",
            "build the bundle again; its manifest does not describe its model",
        )
    return array


def _to_binary(tensor: Tensor, array: Array) -> bytes:
    if tensor.datatype == "BYTES":
        return b"".join(part for v in array.ravel() for part in (BYTES_LENGTH.pack(len(v)), v))
    return array.tobytes()


def _to_json(tensor: Tensor, array: Array) -> list[Any]:
    if tensor.datatype == "BYTES":
        return _texts(tensor, array)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RequestRejected(
            500,
            Reason.NON_FINITE_OUTPUT,
            f"output {tensor.name!r} holds NaN or infinity, which JSON has no form for",
            "ask for binary data to see it; deploy a version that gives finite outputs",
        )
    values: list[Any] = array.ravel().tolist()
    return values


def _texts(tensor: Tensor, array: Array) -> list[Any]:
    try:
        return [v.decode() for v in array.ravel()]
    except UnicodeDecodeError:
        reject(
            f"output {tensor.name!r} holds bytes that are not UTF-8, which JSON has no form for",
            "ask for binary data, with the parameter binary_data",
        )
