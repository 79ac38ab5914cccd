"""Bundles of models that misbehave in the agent's own processes: see tests/support/bad_models/backend.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edge_contract import manifest as m
from tests.support.models import BundleOnDisk, samples, scores, weights_of, write_bundle

FOLDER = Path(__file__).parent / "bad_models"


def let_agents_misbehave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that are started from now on can have bad models."""
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def bad_bundle(
    folder: Path,
    name: str,
    version: int,
    *,
    seed: int = 0,
    classes: int = 4,
    expected: m.Expected | None = None,
    golden_seed: int | None = None,
    probation: m.Probation | None = None,
    **recipe: Any,
) -> BundleOnDisk:
    """`name`@`version`.0.0 of the standard net with these weights and this misbehaviour."""
    weights, bias = weights_of(classes, 8, seed)
    document = {"fault": "none", "at": "run"} | recipe
    document |= {"weights": weights.tolist(), "bias": bias.tolist()}
    x = samples(8)
    answers = scores(x, classes=classes, seed=seed if golden_seed is None else golden_seed)
    return write_bundle(
        folder / f"{name}-{version}",
        name,
        f"{version}.0.0",
        version,
        model=json.dumps(document).encode(),
        inputs=[m.Tensor("x", "FP32", [-1, 8])],
        outputs=[m.Tensor("scores", "FP32", [-1, classes])],
        golden={"input:x": x, "output:scores": answers},
        tolerance=m.Tolerance(1e-4, 1e-3),
        expected=expected or m.Expected(1.0, 2.0, 50.0, 80 << 20, 1.0),
        probation=probation,
    )
