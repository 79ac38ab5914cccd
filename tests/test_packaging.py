"""The wheel, installed as a user does: the base alone, and each extra alone, in environments of their own.

Installs from wherever pip does on this machine, with the versions of constraints.txt.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/fashion_mnist"
MODEL = EXAMPLE / "mobilenet.onnx"
DATA = [f"--{split}={EXAMPLE / split}.npz" for split in ("calibration", "selection", "test")]

pytestmark = pytest.mark.timeout(400)


def run(*command: str | Path, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def pip(*arguments: str | Path, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


class Environment:
    """A virtual environment with the wheel, below `folder`, which is also where its programs run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv/bin"

    def run(self, program: str, *arguments: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
        return run(self.bin / program, *arguments, cwd=self.folder, ok=ok)

    def has(self, package: str) -> bool:
        code = f"import importlib.util as u; print(u.find_spec({package!r}) is not None)"
        return self.run("python", "-c", code).stdout.strip() == "True"


@contextmanager
def environment(folder: Path, wheel: Path, extra: str) -> Iterator[Environment]:
    """A fresh environment with the wheel and one of its extras. Removed at the end: hundreds of megabytes."""
    made = Environment(folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    # This environment's pip, for the new one: installing pip anew takes longer than the rest.
    what = f"{wheel}[{extra}]" if extra else str(wheel)
    constraints = ("--constraint", ROOT / "constraints.txt")
    pip("--python", made.bin / "python", "install", "--no-compile", *constraints, what, cwd=folder)
    yield made
    shutil.rmtree(folder / "venv")


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    with environment(tmp_path_factory.mktemp("base"), wheel, "") as made:
        folders = f'state_dir = "{made.folder}/state"\nrun_dir = "{made.folder}/run"\n'
        (made.folder / "agent.toml").write_text(f'tenant = "acme"\ndevice = "line-3"\n{folders}')
        yield made


@pytest.fixture
def alone(request: pytest.FixtureRequest, wheel: Path, tmp_path: Path) -> Iterator[Environment]:
    """The extra that the test is parametrized with, and nothing else."""
    with environment(tmp_path, wheel, request.param) as made:
        yield made


def only(extra: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("alone", [extra], indirect=True)


def test_the_wheel_holds_what_runs_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for expected in ("edge_contract/py.typed", "device_profiles/generic-arm64.toml", "fleet/cli.py"):
        assert expected in names
    assert not any(name.startswith(("tests/", "examples/", "benchmarks/")) for name in names)
    units = {Path(name).name for name in names if "/data/share/edgeward/systemd/" in name}
    assert {path.name for path in (ROOT / "systemd").rglob("*") if path.is_file()} == units


def test_the_base_is_the_control_process_alone(base: Environment) -> None:
    assert "Serve models on this device" in base.run("edge-agent", "--help").stdout
    for package in ("numpy", "onnxruntime", "ai_edge_litert", "uvicorn", "onnx", "rich"):
        assert not base.has(package), package
    base.run("python", "-c", "import edge_agent.app")
    status = base.run("edge-agent", "status", "--json", "--config", "agent.toml")
    assert json.loads(status.stdout)["device"] == "line-3"
    assert (base.bin.parent / "share/edgeward/systemd/edge-agent.service").is_file()


@pytest.mark.parametrize(
    ("program", "arguments", "extra"),
    [
        ("edge-agent", ["serve", "--config", "agent.toml"], "edgeward[onnx]"),
        ("edge-fleet", ["devices", "--broker", "127.0.0.1:1"], "edgeward[fleet]"),
        (
            "edge-optimize",
            ["run", MODEL, "--profile", "generic-arm64", *DATA, "--output", "out"],
            "edgeward[optimizer]",
        ),
    ],
)
def test_the_base_names_the_extra_that_a_command_needs(
    program: str, arguments: list[str | Path], extra: str, base: Environment
) -> None:
    done = base.run(program, *arguments, ok=False)
    assert done.returncode in (2, 6)
    assert done.stderr.count("\n") == 1
    assert extra in done.stderr


@only("onnx")
def test_onnx_alone_serves_and_measures(alone: Environment) -> None:
    assert not alone.has("onnx")
    assert not alone.has("rich")
    assert "Open Inference Protocol" in alone.run("edge-agent", "serve", "--help").stdout
    alone.run("python", "-c", "import edge_agent.serving.server, edge_agent.serving.backends.onnx")
    report = alone.run("edge-agent", "bench", MODEL, "--rounds", "1", "--round-s", "0.05", "--json")
    (result,) = json.loads(report.stdout)["results"]
    assert result["type"] == "measured"


@only("tflite")
def test_tflite_alone_serves(alone: Environment) -> None:
    assert not alone.has("onnxruntime")
    alone.run("edge-agent", "serve", "--help")
    alone.run("python", "-c", "import edge_agent.serving.server, edge_agent.serving.backends.tflite")
    alone.run("python", "-c", "import ai_edge_litert.interpreter")


@only("optimizer")
def test_the_optimizer_alone_starts_and_can_measure(alone: Environment) -> None:
    assert "--calibration" in alone.run("edge-optimize", "run", "--help").stdout
    alone.run("python", "-c", "import optimizer.run, edge_agent.serving.bench")


@only("fleet")
def test_the_fleet_alone_starts_and_makes_a_registry(alone: Environment) -> None:
    assert not alone.has("onnxruntime")
    for command in ("deploy", "devices", "watch", "registry"):
        alone.run("edge-fleet", command, "--help")
    (alone.folder / "password").write_text("a long enough password\n")
    made = alone.run("edge-fleet", "registry", "init", "registry", "--password-file", "password", "--json")
    assert json.loads(made.stdout)
    assert list((alone.folder / "registry").rglob("1.root.json"))


# --- what is imported is declared ---

# program → the extras that an import of it may rely on, beside the base.
BROUGHT: dict[str, tuple[str, ...]] = {
    "edge_contract": (),
    "edge_agent": ("onnx", "tflite", "delta"),
    "optimizer": ("optimizer",),
    "fleet": ("fleet",),
}
# Modules of the standard library that the oldest Python here does not have yet.
BUILT_IN_LATER = ("compression",)
# Distributions of an extra that must not be needed by the rest of a program, with the reason.
MORE = {"fleet": {"iotcore"}}  # the embedded broker of `edge-fleet broker`, for trials: extra demo


def requirements(extras: tuple[str, ...]) -> set[str]:
    """Names of the distributions that the base and these extras declare, extras of extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines: list[str] = list(project["dependencies"])
    waiting = list(extras)
    while waiting:
        for line in project["optional-dependencies"][waiting.pop()]:
            nested = re.match(r"edgeward\[([a-z,]+)\]", line)
            waiting += nested[1].split(",") if nested else []
            lines.append(line)
    return {name_of(line) for line in lines}


def name_of(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return name[0].lower().replace("_", "-")


def third_party(program: str) -> dict[str, str]:
    """Top-level module of others → one file that imports it."""
    found = {}
    for path in (ROOT / program).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.partition(".")[0]
                if top not in (*sys.stdlib_module_names, *BUILT_IN_LATER, *BROUGHT):
                    found[top] = str(path.relative_to(ROOT))
    return found


@pytest.mark.parametrize("program", BROUGHT)
def test_every_import_is_declared_by_the_extra_that_runs_it(program: str) -> None:
    """Not by luck: what another package happens to need today may be gone tomorrow."""
    distributions = metadata.packages_distributions()
    declared = requirements(BROUGHT[program]) | MORE.get(program, set())
    for module, where in third_party(program).items():
        names = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
        assert names & declared, f"{where} imports {module}, which no extra of {program} declares"
