"""Model, splits and a double of edge-agent, once for all tests of the optimizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer.request import Request
from tests.unit.optimizer import agent_double, nets

# The double's machine is this profile's kind of device unless told otherwise.
PROFILE = """
schema = 1
name = "bench-x86"
title = "The machine of the double"
runtime = "onnxruntime"
architecture = "x86_64"
isa = ["avx2"]
memory_bytes = 1_000_000_000
{top}
[session]
threads = 1
[budget]
{budget}
[quantization]
activations = "uint8"
prefer = ["static_int8", "fp32"]
{quantization}
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx, calibration.npz, selection.npz and test.npz."""
    folder = tmp_path_factory.mktemp("data")
    nets.save(folder / "model.onnx", nets.classifier())
    for i, (name, count) in enumerate({"calibration": 64, "selection": 200, "test": 200}.items()):
        nets.split(folder / f"{name}.npz", count, seed=i)
    return folder


@pytest.fixture
def profile(tmp_path: Path) -> Callable[..., str]:
    """Write a profile file; returns its path as text."""

    def write(budget: str = "", quantization: str = "", top: str = "") -> str:
        path = tmp_path / "profile.toml"
        path.write_text(PROFILE.format(budget=budget, quantization=quantization, top=top))
        return str(path)

    return write


@pytest.fixture
def agent(tmp_path: Path) -> Callable[..., list[str]]:
    """A command that answers as `edge-agent bench --json` would, with the figures given by file stem."""

    def command(**figures: Any) -> list[str]:
        path = tmp_path / "figures.json"
        path.write_text(json.dumps(figures))
        return [sys.executable, agent_double.__file__, str(path)]

    return command


@pytest.fixture
def request_for(
    data: Path, tmp_path: Path, profile: Callable[..., str], agent: Callable[..., list[str]]
) -> Callable[..., Request]:
    """A request for the model and splits of `data`; keywords replace its fields."""

    def make(**fields: Any) -> Request:
        defaults: dict[str, Any] = {
            "model": data / "model.onnx",
            "calibration": data / "calibration.npz",
            "selection": data / "selection.npz",
            "test": data / "test.npz",
            "output": tmp_path / "out",
            "command": ["edge-optimize", "run", "model.onnx"],
        }
        if "profile" not in fields:
            defaults["profile"] = profile()
        if "agent" not in fields:
            defaults["agent"] = agent()
        return Request(**{**defaults, **fields})

    return make
