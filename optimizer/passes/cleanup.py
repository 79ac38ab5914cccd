"""Runs the passes: each on a copy, each checked against the model before it, dropped if it does not hold.

It knows no runtime: whoever calls brings a function that runs a model on a few samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from optimizer.passes.base import Pass, PassFailed, interface
from optimizer.passes.batch_norm import BatchNorm
from optimizer.passes.constants import Constants
from optimizer.passes.dead_code import DeadCode
from optimizer.passes.identities import Identities
from optimizer.passes.opset import Opset
from optimizer.passes.outcome import PassOutcome
from optimizer.passes.overridable_weights import OverridableWeights
from optimizer.passes.shapes import Shapes
from optimizer.text import first_line

# In this order: each one sees what those before it have uncovered.
PASSES: tuple[Pass, ...] = (
    OverridableWeights(),
    Opset(),
    Constants(),
    Identities(),
    BatchNorm(),
    DeadCode(),
    Shapes(),
)

# Folding reorders float32 arithmetic; anything beyond this is a changed model.
RTOL = 1e-3
ATOL_OF_RANGE = 1e-4
_ATOL_LEAST = 1e-7

Outputs = dict[str, NDArray[Any]]


def run(
    model: onnx.ModelProto,
    evaluate: Callable[[onnx.ModelProto], Outputs],
    *,
    passes: Collection[Pass] = PASSES,
    starting: Callable[[str], None] = lambda _name: None,
    crashed: Collection[str] = (),
) -> tuple[onnx.ModelProto, list[PassOutcome]]:
    """The cleaned model and what became of each pass.

    `evaluate` runs a model on the same few samples each time; an exception of it on the given model is the
    caller's to handle. `starting` is told the name of each pass before it begins, so that a process that
    dies leaves a trace; `crashed` names passes that died that way before and are dropped.
    """
    expected = evaluate(model)
    outcomes = []
    for item in passes:
        if item.name in crashed:
            outcomes.append(PassOutcome(item.name, "dropped", "it crashed the process"))
            continue
        starting(item.name)
        model, outcome = _attempt(model, item, evaluate, expected)
        outcomes.append(outcome)
    starting("")
    return model, outcomes


def _attempt(
    model: onnx.ModelProto,
    item: Pass,
    evaluate: Callable[[onnx.ModelProto], Outputs],
    expected: Outputs,
) -> tuple[onnx.ModelProto, PassOutcome]:
    why_not = item.requires(model)
    if why_not:
        return model, PassOutcome(item.name, "not needed", why_not)
    try:
        changed = item.apply(_copy(model))
        broken = item.ensures(changed) or _interface_change(model, changed)
        if not broken:
            broken = difference(expected, evaluate(changed))
    except PassFailed as e:
        return model, PassOutcome(item.name, "dropped", str(e))
    except Exception as e:  # noqa: BLE001 - whatever a pass meets, the model before it is still good
        return model, PassOutcome(item.name, "dropped", f"{type(e).__name__}: {first_line(e)}")
    if broken:
        return model, PassOutcome(item.name, "dropped", broken)
    return changed, PassOutcome(item.name, "applied")


def difference(expected: Outputs, got: Outputs) -> str | None:
    """How `got` differs from `expected` beyond rounding; None if it does not."""
    for name, want in expected.items():
        have = got[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            return (
                f"output {name!r} became {have.dtype} {list(have.shape)} from {want.dtype} {list(want.shape)}"
            )
        if want.dtype.kind != "f":
            if not np.array_equal(want, have):
                return f"output {name!r} changed"
        elif not np.allclose(have, want, rtol=RTOL, atol=_atol(want), equal_nan=True):
            return f"output {name!r} changed by up to {np.nanmax(np.abs(have - want)):.3g}"
    return None


def _range(values: NDArray[Any]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max() - finite.min()) if finite.size else 0.0


def _atol(values: NDArray[Any]) -> float:
    return max(ATOL_OF_RANGE * _range(values), _ATOL_LEAST)


def _interface_change(before: onnx.ModelProto, after: onnx.ModelProto) -> str | None:
    return None if interface(before) == interface(after) else "inputs or outputs changed"


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
