"""Says what an ONNX net of this example is worth: parameters, MACs, file size, top-1 on the full test set.

Accuracy only, by onnxruntime on this machine; latency is the business of `edge-agent bench`.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

try:
    import numpy as np
    import onnx
    import onnxruntime as ort
    from dataset import DEBIAN_FOLDER, DatasetUnreadable, Examples, as_input, read_test_part
    from google.protobuf.message import DecodeError
except ImportError as e:
    sys.exit(f"evaluate: {e.name} is missing. Install the extra: pip install 'edgeward[optimizer]'")

BATCH = 500


class NotThisExample(Exception):
    """The file is no model, or not one from `image` to `logits`. The message names it."""


def load(path: Path) -> onnx.ModelProto:
    """Raises NotThisExample, OSError."""
    try:
        model = onnx.load(str(path))
    except DecodeError as e:
        raise NotThisExample(f"{path} is not an ONNX file: {e}") from e
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    if names != ["image", "logits"]:
        raise NotThisExample(f"{path} has the tensors {names}, this example's nets have 'image' and 'logits'")
    return model


def top1(model: Path, examples: Examples) -> float:
    """Share of `examples`, 0..1, whose highest logit is the label's."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    right = 0
    for start in range(0, len(examples), BATCH):
        batch = examples.take(slice(start, start + BATCH))
        (logits,) = session.run(["logits"], {"image": as_input(batch.pixels)})
        right += int(np.count_nonzero(np.asarray(logits).argmax(axis=1) == batch.labels))
    return right / len(examples)


def parameter_count(model: onnx.ModelProto) -> int:
    """Numbers held in initializers."""
    return sum(math.prod(weight.dims) for weight in model.graph.initializer)


def mac_count(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of float Conv and Gemm for one image; the other nodes are not counted."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    shapes = {
        # `or 1`: the free batch dimension has the value 0.
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in [*inferred.graph.value_info, *inferred.graph.output]
    }
    weights = {weight.name: list(weight.dims) for weight in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += math.prod(shapes[node.output[0]]) * math.prod(weights[node.input[1]][1:])
        elif node.op_type == "Gemm":
            total += math.prod(weights[node.input[1]])
    return total


def describe(path: Path, test_part: Examples) -> str:
    model = load(path)
    return (
        f"{path.name}: {parameter_count(model):,} parameters, {mac_count(model):,} MACs, "
        f"{path.stat().st_size:,} bytes, top-1 {top1(path, test_part):.4f} on {len(test_part):,} test images"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx", help="exported nets")
    parser.add_argument(
        "--data",
        type=Path,
        default=DEBIAN_FOLDER,
        metavar="DIR",
        help="folder with the four *-ubyte.gz files (default: %(default)s)",
    )
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    try:
        test_part = read_test_part(arguments.data)
        for path in arguments.models:
            print(describe(path, test_part))
    except (DatasetUnreadable, NotThisExample, OSError) as e:
        sys.exit(f"evaluate: {e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
