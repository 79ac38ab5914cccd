"""What was asked for, opened and checked before anything runs. It writes nothing and starts nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import UNSET, UnsetType

from edge_contract import canonical
from edge_contract.errors import InputRejected, Reason
from edge_contract.manifest import Name, Probation, Version
from edge_contract.profile import Profile
from optimizer import data, metric, output, probation
from optimizer import profile as profiles
from optimizer.artifact import Artifact, open_model
from optimizer.data import Split
from optimizer.metric import Metric


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for. `agent` starts edge-agent; `timeout_s` bounds each child process."""

    model: Path
    profile: str
    calibration: Path
    selection: Path
    test: Path
    output: Path
    agent: Sequence[str]
    command: Sequence[str]
    metric: str = metric.TOP1
    max_drop: float = 0.01
    name: str | None = None
    version: str = "1"
    release: int = 1
    seed: int = 0
    timeout_s: float = 600.0
    probation: Path | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """The request, opened and found usable."""

    request: Request
    name: str
    profile: Profile
    artifact: Artifact
    metric: Metric
    calibration: Split
    selection: Split
    test: Split
    probation: Probation | UnsetType = UNSET

    @property
    def points(self) -> bool:
        """Whether scores are shares of samples, told in percentage points."""
        return self.metric.name == metric.TOP1


def check(request: Request) -> Checked:
    """Open everything the request names. Raises InputRejected for whatever cannot be used."""
    _check_numbers(request)
    output.check(request.output)
    profile = profiles.load(request.profile)
    terms = UNSET if request.probation is None else probation.load(request.probation)
    artifact = open_model(request.model, profile.runtime)
    name = _name(request)
    scoring = metric.resolve(request.metric, artifact)
    calibration = data.load(request.calibration, "calibration", artifact)
    selection = data.load(request.selection, "selection", artifact)
    test = data.load(request.test, "test", artifact)
    _check_sizes(request, calibration, [selection, test], scoring)
    if scoring.needs_labels:
        for split in (selection, test):
            data.require_labels(split, metric.classes(artifact))
    data.require_disjoint([calibration, selection, test])
    return Checked(request, name, profile, artifact, scoring, calibration, selection, test, terms)


def _check_numbers(request: Request) -> None:
    for option, value in (("--max-drop", request.max_drop), ("--timeout-s", request.timeout_s)):
        if not math.isfinite(value):
            raise InputRejected(Reason.BAD_INPUT, f"{option} is {value}", f"give {option} a finite number")


def _check_sizes(request: Request, calibration: Split, scored: list[Split], scoring: Metric) -> None:
    data.require_enough(
        calibration, minimum=data.MIN_CALIBRATION, why="ranges of activations are taken from them"
    )
    minimum, why = data.MIN_SCORED, "with fewer, a score says nothing"
    if scoring.name == metric.TOP1 and data.minimum_scored(request.max_drop) > minimum:
        minimum = data.minimum_scored(request.max_drop)
        why = f"with fewer, one answer weighs more than the allowed drop of {request.max_drop:g}"
    for split in scored:
        data.require_enough(split, minimum=minimum, why=why)


def _name(request: Request) -> str:
    """The model's name: as given, else from its file."""
    text = request.name
    if text is None:
        text = re.sub(r"[^a-z0-9._-]+", "-", request.model.stem.lower()).strip("-._")
    for option, value, kind in (("--name", text, Name), ("--model-version", request.version, Version)):
        try:
            canonical.from_builtins(value, kind)
        except canonical.DecodeFault as e:
            raise InputRejected(
                Reason.BAD_INPUT,
                f"{value!r} cannot be the model's {option.rpartition('-')[2]}: {e.problem}",
                f"give {option} with letters, digits, '.', '_' and '-' (names in lower case), 63 at most",
            ) from e
    return text
