"""What "accuracy" is: top-1, or a function of the user's. It scores outputs; it does not run models.

A user's function `function(outputs, data)` gets every output and every array of the split, by name, first
dimension samples. It returns either one number for each sample (their mean is the score, and a drop gets a
paired interval) or one number for the split. Higher is better.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_contract.errors import InputRejected, Reason
from optimizer.artifact import Artifact
from optimizer.data import Array, Split
from optimizer.text import first_line

TOP1 = "top1"
_RESAMPLES = 2000
_CONFIDENCE = 0.95

Outputs = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Score:
    """A score over a split; `per_sample` float64 [samples] where the metric has one number for each."""

    value: float
    per_sample: NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class Metric:
    """A named way to score. `needs_labels`: the split must hold class labels."""

    name: str
    needs_labels: bool
    function: Callable[[Outputs, Split], Score]

    def score(self, outputs: Outputs, split: Split) -> Score:
        """The score of `outputs` on `split`. Raises InputRejected if the metric cannot say."""
        return self.function(outputs, split)


def resolve(text: str, artifact: Artifact) -> Metric:
    """The metric called `text`: `top1`, or `FILE.py:function`. Raises InputRejected."""
    if text == TOP1:
        output = _class_output(artifact)
        return Metric(TOP1, True, lambda outputs, split: top1(outputs[output], split))
    path, colon, name = text.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputRejected(
            Reason.BAD_INPUT,
            f"unknown metric {text!r}",
            "give top1, or a function of yours as FILE.py:function",
        )
    function = _load(Path(path), name)
    return Metric(
        f"{Path(path).name}:{name}", False, lambda outputs, split: _call(text, function, outputs, split)
    )


def classes(artifact: Artifact) -> int | None:
    """How many classes the model's scores have, where its file says so."""
    count = artifact.outputs[0].shape[1]
    return None if count == -1 else count


def top1(scores: Array, split: Split) -> Score:
    """Share of samples whose largest score is at their label. `scores` is [samples, classes]."""
    right = (scores.argmax(axis=1) == split.labels()).astype(np.float64)
    return Score(float(right.mean()), right)


def paired_interval(better: Score, worse: Score, seed: int) -> tuple[float, float] | None:
    """95 % interval of the drop from `better` to `worse`, or None without scores for each sample.

    Paired percentile bootstrap (Efron 1979) over the samples' differences: 2,000 resamples, seeded.
    """
    if better.per_sample is None or worse.per_sample is None:
        return None
    differences = better.per_sample - worse.per_sample
    # Resampling n values is drawing how often each distinct one occurs: exact, and quick for few distinct.
    values, counts = np.unique(differences, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(differences), counts / counts.sum(), size=_RESAMPLES)
    means = draws @ values / len(differences)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _class_output(artifact: Artifact) -> str:
    first = artifact.outputs[0]
    if len(first.shape) != 2 or first.shape[1] == 1 or not first.datatype.startswith("FP"):
        raise InputRejected(
            Reason.BAD_INPUT,
            f"the metric top1 needs float class scores [samples, classes]; the model's first output"
            f" {first.name!r} is {first.datatype} {first.shape}",
            "give a metric of your own: --metric FILE.py:function",
        )
    return first.name


def _load(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise InputRejected(Reason.BAD_INPUT, f"metric: {path} is not a file", "give it as FILE.py:function")
    spec = importlib.util.spec_from_file_location("edge_optimize_metric", path)
    if spec is None or spec.loader is None:
        raise InputRejected(Reason.BAD_INPUT, f"metric: {path} is not a Python file", "give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # the user's code may raise anything
        raise _failed(f"{path} cannot be imported", e) from e
    function = getattr(module, name, None)
    if not callable(function):
        raise InputRejected(
            Reason.BAD_INPUT,
            f"metric: {path} has no function {name!r}",
            "name a function defined in that file",
        )
    return function  # type: ignore[no-any-return]


def _call(label: str, function: Callable[..., Any], outputs: Outputs, split: Split) -> Score:
    try:
        result = _numbers(function(dict(outputs), {**split.inputs, **split.extra}))
    except (Exception, SystemExit) as e:  # the user's code may raise anything
        raise _failed(f"{label} raised on the {split.name} split", e) from e
    if result.shape not in ((), (split.samples,)) or not np.isfinite(result).all():
        kind = "an array" if result.ndim else "one number"
        finite = "finite" if np.isfinite(result).all() else "NaN or infinite in places"
        raise InputRejected(
            Reason.METRIC_FAILED,
            f"metric {label} returned {kind} of shape {list(result.shape)}, {finite}, on the"
            f" {split.name} split",
            f"return one finite number, or one for each of the {split.samples} samples",
        )
    return Score(float(result.mean()), result if result.ndim else None)


def _numbers(result: Any) -> NDArray[np.float64]:
    if result is None:  # numpy would make it NaN
        raise TypeError("it returned nothing")
    return np.asarray(result, dtype=np.float64)


def _failed(what: str, error: BaseException) -> InputRejected:
    return InputRejected(
        Reason.METRIC_FAILED,
        f"metric {what}: {type(error).__name__}: {first_line(error)}",
        "correct the function and run again",
    )
