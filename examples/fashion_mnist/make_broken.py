"""Makes a deliberately broken copy of a model: it loads and is as fast, but decides wrongly.

For showing that probation notices a bad release that no checksum or load test can. The source file must be
a float model whose last Gemm or MatMul is the classifier; quantized files are refused. It needs onnx only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import numpy as np
    import numpy.typing as npt
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper
except ImportError as e:
    sys.exit(f"make_broken: {e.name} is missing. Install the extra: pip install 'edgeward[optimizer]'")

FloatArray = npt.NDArray[np.floating]


class NotBreakable(Exception):
    """The source is not a model this script understands. The message says why."""


def one_class(weights: FloatArray, bias: FloatArray | None) -> Iterator[FloatArray]:
    """Class 0 wins (almost) every time.

    Its weight for each feature becomes the largest any class has, and likewise its bias. Features behind a
    ReLU are never negative, so its logit is never below another's; the values stay in their old range.
    """
    for array in _present(weights, bias):
        broken = array.copy()
        broken[0] = array.max(axis=0)
        yield broken


def shuffled(weights: FloatArray, bias: FloatArray | None) -> Iterator[FloatArray]:
    """Every class answers with its neighbour's name, as after a mixed-up label file.

    On balanced traffic the shares of the classes hardly change, so statistics of the outputs do not see it.
    """
    for array in _present(weights, bias):
        yield np.roll(array, 1, axis=0)


FAULTS: dict[str, Callable[[FloatArray, FloatArray | None], Iterator[FloatArray]]] = {
    "one-class": one_class,
    "shuffled": shuffled,
}


def break_model(model: onnx.ModelProto, fault: str) -> None:
    """Applies FAULTS[fault] to the classifier of `model`, in place. Raises NotBreakable."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    node = _classifier(model)
    names = [name for name in node.input[1:3] if name]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise NotBreakable(
            f"{node.op_type} '{node.name}' computes '{missing[0]}': quantized? Give the float file."
        )
    classes_first = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    weights = numpy_helper.to_array(tensors[names[0]])
    oriented = weights if classes_first else weights.T
    bias = numpy_helper.to_array(tensors[names[1]]) if len(names) > 1 else None
    broken_weights, *broken_bias = FAULTS[fault](oriented, bias)
    _replace(tensors[names[0]], broken_weights if classes_first else broken_weights.T)
    for array in broken_bias:
        _replace(tensors[names[1]], array)


def _present(weights: FloatArray, bias: FloatArray | None) -> list[FloatArray]:
    return [weights] if bias is None else [weights, bias]


def _classifier(model: onnx.ModelProto) -> onnx.NodeProto:
    layers: list[onnx.NodeProto] = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    if not layers:
        raise NotBreakable("it has neither a Gemm nor a MatMul")
    return layers[-1]


def _replace(tensor: onnx.TensorProto, array: FloatArray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_broken.py", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC.onnx", help="the sound model; it is only read")
    parser.add_argument("destination", type=Path, metavar="DST.onnx", help="where the broken copy goes")
    parser.add_argument(
        "--fault",
        choices=sorted(FAULTS),
        default="one-class",
        help="how it decides wrongly (default: %(default)s)",
    )
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    try:
        model = onnx.load(str(arguments.source))
        break_model(model, arguments.fault)
        onnx.save(model, str(arguments.destination))
    except (NotBreakable, DecodeError) as e:
        sys.exit(f"make_broken: {arguments.source} cannot be broken: {e}")
    except OSError as e:
        sys.exit(f"make_broken: {e}")
    print(f"{arguments.destination}: {arguments.source} with the fault '{arguments.fault}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
