"""One mosquitto for all tests here, a tenant of its own for each, and the program run in this process."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_contract import wire
from fleet import bus
from fleet.cli import main
from tests.support.broker import Mosquitto
from tests.unit.fleet import samples

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture
def tenant() -> str:
    return f"t{uuid.uuid4().hex[:8]}"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the program; `code` is what it must exit with."""
    monkeypatch.setenv("EDGEWARD_KEY_PASSWORD", samples.PASSWORD)
    for name in ("EDGEWARD_BROKER", "EDGEWARD_TENANT", "EDGEWARD_REGISTRY", "EDGEWARD_KEYS", "EDGEWARD_DB"):
        monkeypatch.delenv(name, raising=False)
    # A broker on loopback does not pause between messages.
    monkeypatch.setattr(bus, "_QUIET_S", 0.2)

    def invoke(*args: object, code: int = 0, **options: Any) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in args], **options)
        if not isinstance(result.exception, SystemExit) and result.exception is not None:
            raise result.exception
        assert result.exit_code == code, f"exit {result.exit_code}: {result.output}"
        return result

    return invoke


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Run the program where it must fail: one line, with a reason code and a next step; returns the line."""

    def invoke(*args: object, code: int, reason: str, **options: Any) -> str:
        result = run(*args, code=code, **options)
        text: str = result.stderr
        assert len(text.strip().splitlines()) == 1, text
        assert f"[{reason}] →" in text, text
        assert "Traceback" not in text
        return text

    return invoke


@pytest.fixture
def registry(tmp_path: Path, run: Run) -> Path:
    """An empty registry; its keys are in `keys` beside it."""
    folder = tmp_path / "registry"
    run("registry", "init", folder)
    return folder


@pytest.fixture
def published(registry: Path, tmp_path: Path, run: Run) -> Path:
    """A registry with fashion 1.0.0 and 2.0.0."""
    for release, version in enumerate(("1.0.0", "2.0.0"), 1):
        bundle = tmp_path / f"bundle-{version}"
        samples.bundle(bundle, weights=version.encode(), version=version, release=release)
        run("registry", "publish", registry, bundle)
    return registry


@pytest.fixture
def operators(registry: Path) -> wire.Operators:
    return samples.reader(registry).operators()
