"""A candidate's first load: whole, loadable, as its manifest says, right on its golden vectors, fast enough.

It runs the model in this process, so a hostile one can crash or hang it: the updater starts it as a
child under limits and takes a crash for a verdict. Whether the device meets the bundle's needs is
checked before, by edge_contract.profile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edge_agent.serving import golden, package, reference, rusage, timing
from edge_agent.serving.arrays import Golden, golden_samples
from edge_agent.serving.backends.base import Loaded, prepare
from edge_agent.serving.durations import percentile_ms
from edge_agent.serving.loader import Opened, open_package
from edge_agent.serving.tensors import Array
from edge_contract.errors import BundleRejected, Reason, RequestRejected
from edge_contract.manifest import Expected, Manifest

# Below this nothing is too slow: timer and scheduler noise is of that size on small boxes.
FLOOR_MS = 1.0
_RUNS = 20
# A model this slow has been timed well enough with fewer runs; the caller's timeout is for hangs.
_TIMED_S = 20.0
_LEAST_RUNS = 5
_REBUILD = "do not deploy this version; build it again and look at what changed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found. Figures that were not reached are 0."""

    ok: bool
    reason: Reason
    what: str
    next_step: str
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    load_ms: float = 0.0
    peak_rss_bytes: int = 0
    reference_ms: float = 0.0


def run(folder: Path, latency_factor: float = 5.0) -> Verdict:
    """Examine the version in a store (or bundle) folder.

    `latency_factor`: how many times slower than its manifest expects, scaled to this machine, a
    candidate may be. Raises InputRejected when there is no version in the folder, DeviceUnfit when its
    runtime is not installed, StorageFault when it cannot be read.
    """
    stored = package.read(folder)
    prepare(stored.manifest.runtime)
    try:
        package.check_digests(stored)
        samples = golden_samples(stored.golden, stored.manifest)
        with package.named_model(stored) as path:
            begun_s = time.perf_counter()
            opened = open_package(stored, path)
            load_ms = (time.perf_counter() - begun_s) * 1000
            try:
                return _examine(opened, samples, load_ms, latency_factor)
            finally:
                opened.model.close()
    except BundleRejected as e:
        return Verdict(False, e.reason, e.what, e.next_step, peak_rss_bytes=rusage.peak_resident_bytes())


def verdict_dict(verdict: Verdict) -> dict[str, Any]:
    """What programs read of a verdict."""
    return asdict(verdict) | {"reason": verdict.reason.value}


def sentence(verdict: Verdict) -> str:
    """What people read of a verdict."""
    if verdict.ok:
        return verdict.what
    return f"rejected: {verdict.what} [{verdict.reason.value}] → {verdict.next_step}"


def _examine(opened: Opened, samples: Sequence[Golden], load_ms: float, factor: float) -> Verdict:
    finding = _golden(opened.manifest, opened.model, samples)
    measured = Verdict(False, Reason.OK, "", "", load_ms=round(load_ms, 3))
    if finding is not None:
        return replace(
            measured,
            reason=finding.reason,
            what=f"{_label(opened.manifest)}: {finding.what}",
            next_step=_REBUILD,
            peak_rss_bytes=rusage.peak_resident_bytes(),
        )
    return _timed(opened, samples[0].inputs, measured, factor)


def _golden(manifest: Manifest, model: Loaded, samples: Sequence[Golden]) -> golden.Finding | None:
    try:
        answers = [model.run(s.inputs) for s in samples]
    except RequestRejected as e:
        return golden.Finding(Reason.INFERENCE_FAILED, f"a golden sample cannot be run: {e.what}")
    for tensor in manifest.outputs:
        pairs = [
            golden.Pair(s.outputs[tensor.name], a[tensor.name]) for s, a in zip(samples, answers, strict=True)
        ]
        finding = golden.compare(tensor, pairs, manifest.golden.tolerance)
        if finding is not None:
            return finding
    return None


def _timed(opened: Opened, inputs: Mapping[str, Array], measured: Verdict, factor: float) -> Verdict:
    timing.warm_up(opened.model, inputs)
    times_ns = timing.latencies_ns(opened.model, inputs, seconds=_TIMED_S, least=_LEAST_RUNS, most=_RUNS)
    p50_ms = percentile_ms(times_ns, 0.5)
    peak_rss_bytes = rusage.peak_resident_bytes()  # before the reference workload adds its own
    reference_ms = reference.measure_ms()
    expected = opened.manifest.expected
    limit_ms = latency_limit_ms(expected, reference_ms, factor)
    measured = replace(
        measured,
        p50_ms=round(p50_ms, 5),
        p95_ms=round(percentile_ms(times_ns, 0.95), 5),
        peak_rss_bytes=peak_rss_bytes,
        reference_ms=round(reference_ms, 4),
    )
    figures = (
        f"p50 {p50_ms:.3f} ms (limit {limit_ms:.3f} ms: {factor:g} times the expected "
        f"{expected.p50_ms:.3f} ms, scaled by {reference_ms / expected.reference_ms:.2f} to this machine, "
        f"at least {FLOOR_MS:g} ms)"
    )
    label = _label(opened.manifest)
    if p50_ms > limit_ms:
        return replace(
            measured, reason=Reason.TOO_SLOW, what=f"{label} is too slow: {figures}", next_step=_REBUILD
        )
    samples = opened.manifest.golden.samples
    return replace(measured, ok=True, what=f"{label} agrees with {samples} golden samples; {figures}")


def latency_limit_ms(expected: Expected, reference_ms: float, factor: float) -> float:
    """The slowest median latency that passes on a machine with this reference time."""
    return max(FLOOR_MS, expected.p50_ms * (reference_ms / expected.reference_ms) * factor)


def _label(manifest: Manifest) -> str:
    return f"{manifest.name}@{manifest.version}"
