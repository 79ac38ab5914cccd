"""Makes this device's own form of a version that passed preflight; keeps it if it is right and not slower.

It runs the candidate in this process, as preflight does and in the same child. That no form could be made is
never held against a version: the model of the bundle serves instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edge_agent.serving import package, prepared, timing
from edge_agent.serving.arrays import Golden, golden_samples
from edge_agent.serving.durations import percentile_ms
from edge_agent.serving.loader import Opened, open_package, spec_of
from edge_agent.serving.preflight import golden_finding
from edge_contract.errors import EdgewardError

# Measured in turn on the same machine; below this it is noise, above it the original is served.
_SLOWER = 1.5
# The scheduler alone moves the median of a model of microseconds by so much.
_NOISE_MS = 0.1
_RUNS = 10


class Adapted(NamedTuple):
    """Whether there is a form now, and one sentence about it."""

    made: bool
    what: str


def run(folder: Path, root: Path, max_bytes: int) -> Adapted:
    """Make the form of the version in a store folder below `root`, or find the one that is there."""
    try:
        stored = package.read(folder)
        if prepared.find(root, stored, hashed=True) is not None:
            return Adapted(True, "a prepared form is there already")
        return _make(root, stored, max_bytes)
    except EdgewardError as e:
        return Adapted(False, f"no prepared form: {e.what}")
    except MemoryError:
        return Adapted(False, "no prepared form: making it takes more memory than there is")


def _make(root: Path, stored: package.Package, max_bytes: int) -> Adapted:
    key = prepared.key_of(stored.manifest)
    if key is None:
        return Adapted(False, f"no prepared form: {stored.manifest.runtime} has none")
    model = prepared.build(root, stored, key, spec_of(stored.manifest, stored.model), max_bytes)
    try:
        problem = _compared(stored, model)
        if problem:
            return Adapted(False, f"no prepared form: {problem}")
        kept = prepared.keep(model, stored, key)
    finally:
        prepared.discard(model)
    size = sum(p.stat().st_size for p in kept.parent.iterdir())
    return Adapted(True, f"a prepared form of {size} bytes")


def _compared(stored: package.Package, model: Path) -> str:
    """What is wrong with the form; empty when it may serve."""
    samples = golden_samples(stored.golden, stored.manifest)
    original = open_package(stored, stored.model)
    form = open_package(stored, model, "prepared")
    try:
        finding = golden_finding(stored.manifest, form.model, samples)
        if finding is not None:
            return finding.what
        return _slower(_median_ms(original, samples), _median_ms(form, samples))
    finally:
        original.model.close()
        form.model.close()


def _slower(original_ms: float, form_ms: float) -> str:
    """What is to be said of a form that is slower than its original; empty when it is not."""
    if form_ms <= max(_SLOWER * original_ms, original_ms + _NOISE_MS):
        return ""
    return f"it takes {form_ms:.3f} ms instead of {original_ms:.3f}"


def _median_ms(opened: Opened, samples: Sequence[Golden]) -> float:
    inputs = samples[0].inputs
    timing.warm_up(opened.model, inputs)
    return percentile_ms(timing.latencies_ns(opened.model, inputs, seconds=1.0, least=3, most=_RUNS), 0.5)
