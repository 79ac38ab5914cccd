"""The bench report: measured and failed models stay apart."""

from __future__ import annotations

import pytest

from edge_contract import canonical
from edge_contract.bench import BenchReport, Failed, Measured
from tests.unit.edge_contract.samples import BENCH


def test_each_result_knows_what_it_is() -> None:
    report = canonical.from_bytes(canonical.to_bytes(BENCH), BenchReport)
    assert [type(result) for result in report.results] == [Measured, Failed]


def test_a_result_of_a_third_kind_is_refused() -> None:
    data = canonical.to_bytes(BENCH).replace(b'"type":"failed"', b'"type":"guessed"')
    with pytest.raises(canonical.DecodeFault, match=r"guessed.* at \$\.results\[1\]\.type"):
        canonical.from_bytes(data, BenchReport)


def test_a_measurement_without_a_figure_is_refused() -> None:
    data = canonical.to_bytes(BENCH).replace(b'"ratio":0.975,', b"")
    with pytest.raises(canonical.DecodeFault, match=r"missing required field `ratio` at \$\.results\[0\]"):
        canonical.from_bytes(data, BenchReport)
