"""The program itself: arguments in, output, exit code and files out. Measured by the real edge-agent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_contract import manifest as contract
from optimizer import measure, report
from optimizer.cli import main
from tests.support import models
from tests.unit.optimizer import nets
from tests.unit.optimizer.passes.graphs import model

PROGRAM = Path(sys.executable).with_name("edge-optimize")


def call(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PROGRAM), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=cwd,
        check=False,
    )


def splits(data: Path) -> list[object]:
    names = ("calibration", "selection", "test")
    return [part for name in names for part in (f"--{name}", data / f"{name}.npz")]


def test_a_whole_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(
        "run", data / "model.onnx", "--profile", "raspberry-pi-4", *splits(data), "--output", out,
        *("--name", "quarters", "--model-version", "1.2", "--release", 5, "--max-drop", 0.05),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "chosen: static_int8" in done.stdout
    assert "latencies did not decide" in done.stdout
    assert "test: top1 " in done.stdout
    assert f"bundle: {out / 'bundle'}" in done.stdout
    assert "building and checking candidates: 5 of 5 are usable" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr, "no colours or bars where there is no terminal"
    for chatter in ("WARNING", "Warning", "pre-processing"):
        assert chatter not in done.stdout + done.stderr
    found = contract.from_bytes((out / "bundle" / "manifest.json").read_bytes())
    assert (found.name, found.version, found.release) == ("quarters", "1.2", 5)
    made = report.from_json((out / "report.json").read_bytes())
    assert made.command[:2] == ["edge-optimize", "run"]
    assert all(c.measured.p50_ms > 0 for c in made.scored)
    agent = PROGRAM.with_name("edge-agent")
    verdict = subprocess.run(
        [agent, "preflight", out / "bundle"], capture_output=True, text=True, timeout=60, check=False
    )
    assert verdict.returncode == 0, "what devices do with a bundle before they serve it: " + verdict.stdout
    assert "agrees with 8 golden samples" in verdict.stdout
    assert made.scored[0].measured.ratio == 1.0


@pytest.fixture
def light(tmp_path: Path) -> Path:
    """A folder with a model that has nothing to quantize, which makes a run short, and its splits."""
    nets.save(tmp_path / "model.onnx", model("g (float[N,4] x) => (float[N,4] scores) { scores = Relu(x) }"))
    for i, name in enumerate(("calibration", "selection", "test")):
        x = models.samples(120, features=4, seed=i)
        np.savez(tmp_path / f"{name}.npz", x=x, label=x.argmax(axis=1))
    return tmp_path


@pytest.fixture
def in_process(
    agent: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run the program here, measured by the double; returns exit code and standard output."""

    def go(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(measure, "agent_command", agent)
        with pytest.raises(SystemExit) as caught:
            main.main([str(a) for a in arguments])
        code = caught.value.code
        return (code if isinstance(code, int) else 0), capsys.readouterr().out

    return go


def test_json_for_programs_and_a_metric_of_ones_own(
    light: Path, in_process: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (light / "mine.py").write_text(
        "def right(outputs, data):\n    return outputs['scores'].argmax(axis=1) == data['label']\n"
    )
    monkeypatch.chdir(light)
    code, stdout = in_process(
        "run", "model.onnx", "--profile", "generic-x86-64", *splits(light), "--output", "out",
        "--metric", "mine.py:right", "--json",
    )  # fmt: skip
    assert code == 0
    document = json.loads(stdout)
    assert document["ok"] is True
    assert document["report"] == json.loads((light / "out" / "report.json").read_bytes())
    assert document["report"]["metric"] == "mine.py:right"
    assert document["report"]["test"]["value"] == 1.0


@pytest.mark.parametrize("as_json", [True, False])
def test_a_refusal(as_json: bool, light: Path, in_process: Callable[..., tuple[int, str]]) -> None:
    profile = light / "tiny.toml"
    shipped = Path(__file__).parents[3] / "device_profiles" / "generic-x86-64.toml"
    profile.write_text(shipped.read_text().replace("[budget]", "[budget]\nsize_bytes = 10"))
    out = light / "out"
    flags = ["--json"] if as_json else []
    code, stdout = in_process(
        "run", light / "model.onnx", "--profile", profile, *splits(light), "--output", out, *flags
    )
    assert code == 3
    if as_json:
        error = json.loads(stdout)
        assert error["ok"] is False
        assert error["error"]["reason"] == "nothing_fits"
        assert "the nearest is" in error["error"]["what"]
    else:
        assert "over the budget of 10 B" in stdout
        assert f"report: {out / 'report.html'}" in stdout
        assert "chosen" not in stdout
    assert (out / "report.html").is_file()
    assert not (out / "bundle").exists()


@pytest.mark.parametrize("as_json", [True, False])
def test_bad_input_is_one_line_with_a_code(as_json: bool, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes((data / "model.onnx").read_bytes()[:500])
    flags = ["--json"] if as_json else []
    done = call(
        "run", broken, "--profile", "raspberry-pi-4", *splits(data), "--output", tmp_path / "o", *flags
    )
    assert done.returncode == 2
    if as_json:
        assert json.loads(done.stdout)["error"]["reason"] == "model_unreadable"
    else:
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith(f"edge-optimize: {broken} ")
        assert "[model_unreadable]" in line
    assert not (tmp_path / "o").exists()


def test_profiles(tmp_path: Path) -> None:
    done = call("profiles")
    assert done.returncode == 0
    assert "raspberry-pi-5" in done.stdout
    listed = json.loads(call("profiles", "--json").stdout)["profiles"]
    assert {p["name"] for p in listed} >= {"raspberry-pi-4", "x86-64-vnni"}


def complete(words: str, index: int) -> list[str]:
    environment = {"_EDGE_OPTIMIZE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
    done = subprocess.run(
        [str(PROGRAM)], capture_output=True, text=True, timeout=30, env=environment, check=False
    )
    return done.stdout.split()


def test_profile_names_complete() -> None:
    assert complete("edge-optimize run --profile rasp", 3) == [
        "plain,raspberry-pi-3-32bit",
        "plain,raspberry-pi-4",
        "plain,raspberry-pi-5",
    ]
    assert complete("edge-optimize run --profile ./mine", 3) == ["file,./mine"]


@pytest.mark.parametrize("missing", ["onnx", "rich"])
def test_without_the_extra_one_line_says_so(missing: str, data: Path, tmp_path: Path) -> None:
    """The base install is a device's: no numpy, no onnx."""
    code = (
        "import sys, importlib.util as u; real = u.find_spec;"
        f" u.find_spec = lambda n, *a: None if n == {missing!r} else real(n, *a);"
        " from optimizer.cli import main; main()"
    )
    command = ["run", "m.onnx", "--profile", "x", *map(str, splits(data)), "--output", str(tmp_path / "o")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"edge-optimize: this needs {missing}, not installed here [runtime_missing]"
    )
