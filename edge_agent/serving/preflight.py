"""A candidate's first load: whole, as its manifest says, right on its golden vectors, within its bounds.

It runs the model in this process, so a hostile one can crash or hang it: the updater starts it as a
child under limits and takes a crash for a verdict. Whether the device meets the bundle's needs is
checked before, by edge_contract.profile; whether clients of the version before can talk to it, by the
updater.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from edge_agent.serving import golden, package, reference, rusage, timing
from edge_agent.serving.arrays import Golden, golden_samples
from edge_agent.serving.backends.base import Loaded, prepare
from edge_agent.serving.durations import percentile_ms
from edge_agent.serving.loader import Opened, open_package
from edge_agent.serving.tensors import Array
from edge_contract.errors import BundleRejected, DeviceUnfit, Reason, RequestRejected
from edge_contract.manifest import Expected, Manifest

# Below this nothing is too slow: timer and scheduler noise is of that size on small boxes.
FLOOR_MS = 1.0
# Below this growth nothing is too large: allocators and the runtime's own buffers are of that size.
FLOOR_BYTES = 64 << 20
_RUNS = 20
_LEAST_RUNS = 4
# A device that is busy now slows down some rounds, not all of them: the best of so many counts. A model
# that passes in the first needs no second.
_ROUNDS = 4
# In which a slow model is timed well enough with fewer runs; the caller's timeout is for hangs.
_ROUND_S, _MEASURED_S = 2.0, 10.0
_REBUILD = "do not deploy this version; build it again and look at what changed"


class Terms(NamedTuple):
    """What a candidate is held to beside its manifest.

    How many times slower, and larger in memory, than expected it may be (latency scaled to this machine),
    and what must stay free on the device while it is loaded beside what runs.
    """

    latency_factor: float = 5.0
    memory_factor: float = 2.0
    free_bytes: int = 0


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


class Timed(NamedTuple):
    """Latency here and the time of the reference workload here, from the same minutes."""

    p50_ms: float
    p95_ms: float
    reference_ms: float


def run(folder: Path, terms: Terms = Terms()) -> Verdict:  # noqa: B008 - immutable
    """Examine the version in a store (or bundle) folder.

    Raises InputRejected when there is no version in the folder, DeviceUnfit when its runtime is not
    installed or the device has no memory for it now, StorageFault when it cannot be read.
    """
    stored = package.read(folder)
    prepare(stored.manifest.runtime)
    try:
        package.check_digests(stored)
        samples = golden_samples(stored.golden, stored.manifest)
        _check_room(stored, terms)
        with package.named_model(stored) as path:
            return _examine(stored, path, samples, terms)
    except BundleRejected as e:
        return Verdict(False, e.reason, e.what, e.next_step, peak_rss_bytes=rusage.peak_resident_bytes())
    except MemoryError as e:
        what = f"{stored.label} takes more memory than it is allowed here: {e or 'MemoryError'}"
        return Verdict(False, Reason.MEMORY_EXCEEDED, " ".join(what.split()), _REBUILD)


def verdict_dict(verdict: Verdict) -> dict[str, Any]:
    """What programs read of a verdict."""
    return asdict(verdict) | {"reason": verdict.reason.value}


def sentence(verdict: Verdict) -> str:
    """What people read of a verdict."""
    if verdict.ok:
        return verdict.what
    return f"rejected: {verdict.what} [{verdict.reason.value}] → {verdict.next_step}"


def _examine(stored: package.Package, path: Path, samples: Sequence[Golden], terms: Terms) -> Verdict:
    # What this process did before must not count against the candidate: where the peak cannot begin anew,
    # what has been reached already is what it is compared with.
    before_bytes = rusage.resident_bytes() if rusage.forget_peak() else rusage.peak_resident_bytes()
    begun_s = time.perf_counter()
    opened = open_package(stored, path)
    load_ms = (time.perf_counter() - begun_s) * 1000
    try:
        measured = Verdict(False, Reason.OK, "", "", load_ms=round(load_ms, 3))
        finding = golden_finding(opened.manifest, opened.model, samples)
        if finding is None:
            timing.warm_up(opened.model, samples[0].inputs)
        measured = replace(measured, peak_rss_bytes=rusage.peak_resident_bytes())
        finding = finding or _memory(opened.manifest, measured.peak_rss_bytes, before_bytes, terms)
        if finding is not None:
            what = f"{stored.label}: {finding.what}"
            return replace(measured, reason=finding.reason, what=what, next_step=_REBUILD)
        _check_room(stored, terms, loaded=True)
        return _timed(opened, samples[0].inputs, measured, terms.latency_factor)
    finally:
        opened.model.close()


def golden_finding(manifest: Manifest, model: Loaded, samples: Sequence[Golden]) -> golden.Finding | None:
    """Whether a model in memory answers its golden samples as its manifest says."""
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


def _memory(manifest: Manifest, peak_bytes: int, before_bytes: int, terms: Terms) -> golden.Finding | None:
    limit_bytes = memory_limit_bytes(manifest.expected, before_bytes, terms.memory_factor)
    if peak_bytes <= limit_bytes:
        return None
    return golden.Finding(
        Reason.MEMORY_EXCEEDED,
        f"it takes {peak_bytes} bytes of memory, its limit is {limit_bytes} ({terms.memory_factor:g} times "
        f"the {manifest.expected.peak_rss_bytes} that its manifest expects)",
    )


def memory_limit_bytes(expected: Expected, before_bytes: int, factor: float) -> int:
    """The largest resident memory that passes in a process that had `before_bytes` before the load."""
    return max(before_bytes + FLOOR_BYTES, int(expected.peak_rss_bytes * factor))


def _check_room(stored: package.Package, terms: Terms, *, loaded: bool = False) -> None:
    """Memory that is free now, beside what serves: before the load for the weights, after it for the rest."""
    weights = sum(f.size_bytes for f in stored.manifest.files if f.role in ("model", "external_data"))
    wanted = terms.free_bytes + (0 if loaded else weights)
    found = rusage.available_bytes()
    if found < wanted:
        when = "while it is loaded" if loaded else "before it is loaded"
        raise DeviceUnfit(
            Reason.MEMORY_TOO_SMALL,
            f"{stored.label} does not fit beside what runs: {found} bytes are free {when}, it takes {wanted}",
            "free memory, deploy a smaller version, or lower update.preflight_free_bytes",
        )


def _timed(opened: Opened, inputs: Mapping[str, Array], measured: Verdict, factor: float) -> Verdict:
    expected = opened.manifest.expected
    found = measure(
        opened.model, inputs, lambda t: t.p50_ms <= latency_limit_ms(expected, t.reference_ms, factor)
    )
    limit_ms = latency_limit_ms(expected, found.reference_ms, factor)
    measured = replace(
        measured,
        p50_ms=round(found.p50_ms, 5),
        p95_ms=round(found.p95_ms, 5),
        reference_ms=round(found.reference_ms, 4),
    )
    figures = (
        f"p50 {found.p50_ms:.3f} ms (limit {limit_ms:.3f} ms: {factor:g} times the expected "
        f"{expected.p50_ms:.3f} ms, scaled by {found.reference_ms / expected.reference_ms:.2f} to this "
        f"machine, at least {FLOOR_MS:g} ms)"
    )
    label = _label(opened.manifest)
    if found.p50_ms > limit_ms:
        return replace(
            measured, reason=Reason.TOO_SLOW, what=f"{label} is too slow: {figures}", next_step=_REBUILD
        )
    samples = opened.manifest.golden.samples
    return replace(measured, ok=True, what=f"{label} agrees with {samples} golden samples; {figures}")


def measure(model: Loaded, inputs: Mapping[str, Array], enough: Callable[[Timed], bool]) -> Timed:
    """Rounds of runs and reference, in turn, until the best of each is `enough`, at most `_ROUNDS` of them.

    Wall time, not the CPU time of this thread: a session may have other threads, and a model that waits is
    slow, too. The best round, because only a slow model is slow in every one.
    """
    rounds: list[Timed] = []
    end_s = time.monotonic() + _MEASURED_S
    while True:
        times_ns = timing.latencies_ns(model, inputs, seconds=_ROUND_S, least=_LEAST_RUNS, most=_RUNS)
        rounds.append(
            Timed(percentile_ms(times_ns, 0.5), percentile_ms(times_ns, 0.95), reference.measure_ms())
        )
        best = min(rounds, key=lambda r: r.p50_ms)
        best = best._replace(reference_ms=min(r.reference_ms for r in rounds))
        if enough(best) or len(rounds) == _ROUNDS or time.monotonic() > end_s:
            return best


def latency_limit_ms(expected: Expected, reference_ms: float, factor: float) -> float:
    """The slowest median latency that passes on a machine with this reference time."""
    return max(FLOOR_MS, expected.p50_ms * (reference_ms / expected.reference_ms) * factor)


def _label(manifest: Manifest) -> str:
    return f"{manifest.name}@{manifest.version}"
