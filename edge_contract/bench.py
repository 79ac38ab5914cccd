"""Pure: what `edge-agent bench --json` prints and the optimizer reads. Measuring is not done here."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from edge_contract.errors import Reason
from edge_contract.profile import Facts


class Measured(Struct, frozen=True, forbid_unknown_fields=True, tag="measured"):
    """One model's figures. Latencies are of single inferences; `ratio` is the median over rounds of
    this model's p50 by the first model's p50 of the same round, so machine noise cancels."""

    model: str
    sha256: str
    size_bytes: int
    load_ms: float
    peak_rss_bytes: int
    p50_ms: float
    p95_ms: float
    cpu_ms: float
    ratio: float
    iterations: int


class Failed(Struct, frozen=True, forbid_unknown_fields=True, tag="failed"):
    """A model that could not be loaded or run; the others are measured all the same."""

    model: str
    reason: Reason
    what: str
    next_step: str


class BenchReport(Struct, frozen=True, forbid_unknown_fields=True):
    """One run of the benchmark. `reference_ms` times a fixed workload, to compare machines."""

    schema: Literal[1]
    machine: Facts
    threads: int
    rounds: int
    reference_ms: float
    results: list[Measured | Failed]
