"""What a run found, as one value: report.json is its encoding; the page, the plots and the table read it."""

from __future__ import annotations

import json
from typing import Literal

import msgspec
from msgspec import Struct

from edge_contract.manifest import Tensor
from edge_contract.profile import Facts, Profile
from optimizer.choose import Accuracy, Candidate, Choice, Refusal, Scored
from optimizer.passes.outcome import PassOutcome
from optimizer.recipes import Omitted

INTERVAL = "95 %, paired percentile bootstrap over samples, 2000 resamples"


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Source(_Strict, frozen=True):
    """The model that was given."""

    path: str
    sha256: str
    size_bytes: int
    opset: int
    parameters: int
    ops: dict[str, int]
    inputs: list[Tensor]
    outputs: list[Tensor]


class SplitUsed(_Strict, frozen=True):
    """One data split; `digest` is over its content, however it is zipped."""

    name: str
    path: str
    samples: int
    digest: str


class Bench(_Strict, frozen=True):
    """How and where latencies were measured. `gap`: why they do not rank candidates for the profile."""

    machine: Facts
    threads: int
    rounds: int
    reference_ms: float
    gap: str | None


class Report(_Strict, frozen=True):
    """Everything a run found. `test` is None where nothing was chosen; `bundle_sha256` is the manifest's."""

    kind: Literal["edge-optimize report"]
    schema: Literal[1]
    name: str
    version: str
    release: int
    source: Source
    profile: Profile
    profile_sha256: str
    splits: list[SplitUsed]
    metric: str
    max_drop: float
    interval: str
    seed: int
    passes: list[PassOutcome]
    omitted: list[Omitted]
    candidates: list[Candidate]
    outcome: Choice | Refusal
    test: Accuracy | None
    bench: Bench
    bundle_sha256: str | None
    optimizer_version: str
    command: list[str]
    created: str
    duration_s: float

    @property
    def points(self) -> bool:
        """Whether scores are shares of samples."""
        return self.metric == "top1"

    @property
    def chosen(self) -> Scored | None:
        """The candidate that won."""
        name = self.outcome.name if isinstance(self.outcome, Choice) else None
        return next((c for c in self.scored if c.name == name), None)

    @property
    def scored(self) -> list[Scored]:
        """The candidates with figures, in the order they were tried."""
        return [c for c in self.candidates if isinstance(c, Scored)]


def to_json(report: Report) -> bytes:
    """Indented JSON for people and programs."""
    return (json.dumps(msgspec.to_builtins(report), indent=2, ensure_ascii=False) + "\n").encode()


def from_json(data: bytes) -> Report:
    """The report in `data`, as to_json wrote it. Raises msgspec.DecodeError."""
    return msgspec.json.decode(data, type=Report)
