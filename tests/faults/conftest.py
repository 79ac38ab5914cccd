"""The fault suite counts what it broke: every case is a point in the code or the world and a fault there.

A test names its cases with the fixture `cases`; the summary at the end says how many there were. Counts
travel in the reports, so they add up over several workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

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
