"""The fault suite counts what it broke: every case is a point in the code or the world and a fault there.

A test names its cases with the fixture `cases`; the summary at the end says how many there were. Counts
travel in the reports, so they add up over several workers.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.broker import Mosquitto
from tests.support.registry_folder import RegistryFolder
from tests.support.site import MakeSite, sites

_CASE = "fault_case"


class Cases(NamedTuple):
    """The cases of one test."""

    node: pytest.Item

    def add(self, point: str, fault: str) -> None:
        """One fault at one point was provoked, and what must hold afterwards is about to be checked."""
        self.node.user_properties.append((_CASE, (point, fault)))


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Cases:
    return Cases(request.node)


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> RegistryFolder:
    return RegistryFolder.create(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def make_site(mosquitto: Mosquitto, registry: RegistryFolder, tmp_path: Path) -> Iterator[MakeSite]:
    yield from sites(mosquitto, registry, tmp_path)


@pytest.fixture(scope="module")
def make_module_site(
    mosquitto: Mosquitto, registry: RegistryFolder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeSite]:
    yield from sites(mosquitto, registry, tmp_path_factory.mktemp("site"))


@pytest.fixture
def name() -> str:
    """A model's name that no other test uses."""
    return f"m{uuid.uuid4().hex[:10]}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many points and faults the passed tests went through."""
    found = _cases(terminalreporter.stats.get("passed", []))
    if found:
        points, faults = {point for point, _ in found}, {fault for _, fault in found}
        terminalreporter.write_line(
            f"faults: {len(found)} cases, of {len(points)} points × {len(faults)} kinds of fault"
        )


def _cases(reports: Sequence[pytest.TestReport]) -> list[tuple[str, str]]:
    return [
        (str(value[0]), str(value[1]))
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == _CASE
    ]
