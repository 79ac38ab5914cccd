"""Measuring through `edge-agent bench`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_contract.bench import Failed, Measured
from edge_contract.errors import InputRejected, Reason, Refused
from optimizer import bundle, measure
from tests.unit.optimizer import nets

Agent = Callable[..., list[str]]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [nets.save(tmp_path / f"{name}.onnx", nets.classifier()) for name in ("fp32", "static_int8")]


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.npz"
    path.write_bytes(bundle.npz_bytes({"image": nets.images(1, seed=1)[0]}))
    return path


def test_the_report_comes_back(models: list[Path], sample: Path, agent: Agent) -> None:
    command = agent(static_int8={"ratio": 0.5})
    report = measure.bench(command, models, sample, threads=3, timeout_s=30)
    assert report.threads == 3
    assert report.rounds == measure.ROUNDS
    fp32, static = report.results
    assert isinstance(fp32, Measured)
    assert isinstance(static, Measured)
    assert (fp32.ratio, static.ratio) == (1.0, 0.5)


def test_a_model_that_fails_is_a_result(models: list[Path], sample: Path, agent: Agent) -> None:
    report = measure.bench(agent(static_int8={"failed": True}), models, sample, threads=1, timeout_s=30)
    assert isinstance(report.results[1], Failed)


def test_the_user_is_told_that_time_passes(models: list[Path], sample: Path, tmp_path: Path) -> None:
    slow = [sys.executable, "-c", "import time; time.sleep(1); print('{}')"]
    seen: list[float] = []
    with pytest.raises(Refused):
        measure.bench(slow, models, sample, threads=1, timeout_s=30, waiting=seen.append)
    assert seen
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('no such option')", "ended with status 1: no such option"),
        (
            "import json, sys; print(json.dumps({'ok': False, 'error': {'reason': 'bad_input', 'what': 'no',"
            " 'next_step': ''}})); sys.exit(2)",
            "ended with status 2: no [bad_input]",
        ),
        ("print('not json')", "ended with status 0: not json"),
        ("print('{\"schema\": 1}')", "ended with status 0"),
        ("import os; os.kill(os.getpid(), 11)", "ended with status -11"),
    ],
)
def test_a_benchmark_that_fails(code: str, words: str, models: list[Path], sample: Path) -> None:
    with pytest.raises(Refused) as caught:
        measure.bench([sys.executable, "-c", code], models, sample, threads=1, timeout_s=30)
    assert words in caught.value.what
    assert caught.value.reason is Reason.CANDIDATE_CRASHED


def test_a_benchmark_that_hangs_is_ended(models: list[Path], sample: Path) -> None:
    hanging = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(Refused, match="took longer than 1 s"):
        measure.bench(hanging, models, sample, threads=1, timeout_s=0.5)


def test_a_report_of_other_models(models: list[Path], sample: Path, agent: Agent) -> None:
    command = [sys.executable, "-c", DROPPING, *agent()[1:]]
    with pytest.raises(Refused, match="measured 1 of 2 models"):
        measure.bench(command, models, sample, threads=1, timeout_s=30)


# Runs the double without the last model.
DROPPING = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:-1]], check=True)"


def test_the_agent_beside_this_interpreter_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "venv" / "edge-agent"
    elsewhere = tmp_path / "bin" / "edge-agent"
    for path in (beside, elsewhere):
        path.parent.mkdir()
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(beside.with_name("python")))
    monkeypatch.setenv("PATH", str(elsewhere.parent))
    assert measure.agent_command() == [str(beside)]
    beside.unlink()
    assert measure.agent_command() == [str(elsewhere)]
    elsewhere.unlink()
    with pytest.raises(InputRejected) as caught:
        measure.agent_command()
    assert caught.value.reason is Reason.RUNTIME_MISSING
