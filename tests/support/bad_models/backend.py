"""A backend that really misbehaves: its models are JSON, a net's weights and what is wrong with it.

`fault` happens `at` "load", or in every run after the first `after`; only in the process `where` says
("preflight", "serve", or "start": a serving process that loads what `current` names), everywhere by default.
It implements the interface of edge_agent/serving/backends/base.py and runs in the agent's own processes;
models that are no JSON go to the backend whose place it takes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.serving.backends import base
from edge_agent.serving.tensors import Array
from edge_contract.manifest import Tensor

_MB = 1 << 20


_spec = importlib.util.spec_from_file_location(f"{__name__}_itself", Path(base.__file__).with_name("onnx.py"))
assert _spec is not None
assert _spec.loader is not None
_real = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_real)
prepare, version, optimise = _real.prepare, _real.version, _real.optimise


def open(spec: base.Spec) -> Any:  # noqa: A001 - the interface's name
    data = spec.model.read_bytes()
    return BadModel(spec.model, json.loads(data)) if data.startswith(b"{") else _real.open(spec)


class BadModel:
    def __init__(self, path: Path, recipe: dict[str, Any]) -> None:
        self._recipe = recipe
        self._weights = np.array(recipe["weights"], np.float32)
        self._bias = np.array(recipe["bias"], np.float32)
        self._runs = 0
        self._kept: list[Any] = []
        self._armed = _is_here(path, recipe.get("where", ""))
        features, classes = self._weights.shape
        self.inputs = [Tensor("x", "FP32", [-1, features])]
        self.outputs = [Tensor("scores", "FP32", [-1, classes])]
        if self._armed and recipe["at"] == "load":
            self._misbehave()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = inputs["x"].astype(np.float64) @ self._weights + self._bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
        self._runs += 1
        if self._armed and self._recipe["at"] == "run" and self._runs > self._recipe.get("after", 0):
            self._misbehave()
            if self._recipe["fault"] == "nan":
                scores[:] = np.nan
        return {"scores": scores}

    def close(self) -> None:
        self._kept.clear()

    def _misbehave(self) -> None:
        match self._recipe["fault"]:
            case "abort":
                os.abort()
            case "segfault":
                ctypes.string_at(0)
            case "bomb":
                while True:
                    self._kept.append(np.ones(16 * _MB, np.uint8))
            case "hold":
                self._kept.append(np.ones(self._recipe["amount"], np.uint8))
            case "leak":
                self._kept.append(np.ones(self._recipe["amount"], np.uint8))
            case "freeze":
                ctypes.PyDLL(None).sleep(3600)  # in C, and with the interpreter's lock held
            case "hang":
                time.sleep(3600)
            case "slow":
                time.sleep(self._recipe["amount"] / 1000)


def _is_here(path: Path, where: str) -> bool:
    if where == "start":
        current = path.parent.parent.parent / "models"
        return "serve" in sys.argv and any(p.resolve() == path.parent for p in current.glob("*/current"))
    return where in ("", *sys.argv)
