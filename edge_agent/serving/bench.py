"""Models measured against each other as this device would serve them, each in a process of its own.

Rounds alternate (A B C, A B C, …), so that what the machine does meanwhile hits all alike; the ratio of
two models is the median over rounds, each round by itself. What crashes, hangs or does not load is a
result; the others are measured all the same. Which model is better is not decided here.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_agent import facts
from edge_agent.serving import package
from edge_agent.serving.bench_process import Died, Worker
from edge_agent.serving.durations import percentile_ms
from edge_contract.bench import BenchReport, Failed, Measured
from edge_contract.errors import DeviceUnfit, InputRejected, Reason
from edge_contract.manifest import Runtime

_SUFFIXES: dict[str, Runtime] = {".onnx": "onnxruntime", ".tflite": "tflite"}
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to measure: how the user named it, and what to open."""

    label: str
    model: Path
    runtime: Runtime
    spinning: bool
    sha256: str
    size_bytes: int


@dataclass(slots=True)
class Series:
    """What one model's process has delivered so far, or how it failed."""

    subject: Subject
    load_ms: float = 0.0
    peak_rss_bytes: int = 0
    cpu_ns: int = 0
    rounds: list[list[int]] = field(default_factory=list)
    failed: Failed | None = None


def run(
    models: list[Path],
    *,
    threads: int,
    rounds: int,
    round_s: float,
    inputs: Path | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> BenchReport:
    """Measure `models`: .onnx or .tflite files, bundle folders or store folders.

    Each runs on the first sample of the NPZ `inputs`, or on synthetic values. The ratios are to the
    first model that could be measured. `timeout_s` bounds a load and, beyond its `round_s`, a round.

    Raises InputRejected for a missing file or inputs that do not fit, DeviceUnfit without numpy.
    """
    with ExitStack() as stack:
        subjects = [_subject(path, stack) for path in models]
        reference_ms = _reference_ms(timeout_s)
        workers = [(Series(s), Worker(timeout_s)) for s in subjects]
        for _, worker in workers:
            stack.callback(worker.close)
        for series, worker in workers:
            _open(series, worker, threads, inputs)
        for _ in range(rounds):
            for series, worker in workers:
                _round(series, worker, round_s)
        for series, worker in workers:
            _peak(series, worker)
    return BenchReport(
        schema=1,
        machine=facts.probe(),
        threads=threads,
        rounds=rounds,
        reference_ms=round(reference_ms, 4),
        results=_results([series for series, _ in workers]),
    )


def table(report: BenchReport) -> str:
    """The report as plain-text columns; failures below, one line each."""
    head = ["model", "p50 ms", "p95 ms", "ratio", "load ms", "peak MB", "cpu ms", "size kB"]
    rows = [head] + [_row(r) for r in report.results if isinstance(r, Measured)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += [
        f"{r.model}: failed: {r.what} [{r.reason.value}] → {r.next_step}"
        for r in report.results
        if isinstance(r, Failed)
    ]
    lines.append(
        f"{report.machine.cpu}, {report.threads} thread(s), {report.rounds} rounds, "
        f"reference {report.reference_ms:.2f} ms"
    )
    return "\n".join(lines)


def _subject(path: Path, stack: ExitStack) -> Subject:
    if path.is_dir():
        found = package.read(path)
        package.check_sizes(found)
        model = stack.enter_context(package.named_model(found))
        weights = [f for f in found.manifest.files if f.role in ("model", "external_data")]
        size = sum(f.size_bytes for f in weights)
        spinning = found.manifest.session.spinning
        sha256 = found.manifest.file("model").sha256
        return Subject(str(path), model, found.manifest.runtime, spinning, sha256, size)
    if not path.is_file():
        raise InputRejected(
            Reason.BAD_INPUT, f"{path}: no such file or folder", "name an existing model or bundle"
        )
    runtime = _SUFFIXES.get(path.suffix)
    if runtime is None:
        raise InputRejected(
            Reason.MODEL_UNSUPPORTED,
            f"{path} is neither an .onnx nor a .tflite file nor a folder with a manifest",
            "give a model of one of these kinds",
        )
    return Subject(str(path), path, runtime, False, package.file_digest(path), path.stat().st_size)


def _reference_ms(timeout_s: float) -> float:
    worker = Worker(timeout_s)
    try:
        return float(worker.ask(op="reference")["reference_ms"])
    except Died as e:
        raise DeviceUnfit(
            Reason.RUNTIME_MISSING,
            f"the reference workload does not run here: {e.what}",
            "install edgeward[onnx] or edgeward[tflite], which bring numpy",
        ) from e
    finally:
        worker.close()


def _open(series: Series, worker: Worker, threads: int, inputs: Path | None) -> None:
    subject = series.subject
    answer = _ask(
        series,
        worker,
        op="open",
        model=str(subject.model),
        runtime=subject.runtime,
        threads=threads,
        spinning=subject.spinning,
        inputs=None if inputs is None else str(inputs),
    )
    series.load_ms = answer.get("load_ms", 0.0)


def _round(series: Series, worker: Worker, round_s: float) -> None:
    answer = _ask(series, worker, extra_s=round_s, op="round", seconds=round_s)
    series.rounds.append(answer.get("latencies_ns", []))
    series.cpu_ns += answer.get("cpu_ns", 0)


def _peak(series: Series, worker: Worker) -> None:
    series.peak_rss_bytes = _ask(series, worker, op="peak").get("peak_rss_bytes", 0)


def _ask(series: Series, worker: Worker, **request: Any) -> dict[str, Any]:
    """The worker's answer; an empty one when the model has failed, now or before."""
    if series.failed is not None:
        return {}
    try:
        answer = worker.ask(**request)
    except Died as e:
        answer = {"error": {"reason": e.reason, "what": e.what, "next_step": e.next_step}}
    error = answer.get("error")
    if error is None:
        return answer
    reason = Reason(error["reason"])
    if error.get("fault") == InputRejected.__name__:
        raise InputRejected(reason, error["what"], error["next_step"])
    series.failed = Failed(series.subject.label, reason, error["what"], error["next_step"])
    worker.close()
    return {}


def _results(all_series: list[Series]) -> list[Measured | Failed]:
    baseline = next((s for s in all_series if s.failed is None), None)
    return [s.failed or _measured(s, baseline or s) for s in all_series]


def _measured(series: Series, baseline: Series) -> Measured:
    values = [v for part in series.rounds for v in part]
    subject = series.subject
    return Measured(
        model=subject.label,
        sha256=subject.sha256,
        size_bytes=subject.size_bytes,
        load_ms=round(series.load_ms, 3),
        peak_rss_bytes=series.peak_rss_bytes,
        p50_ms=round(percentile_ms(values, 0.5), 5),
        p95_ms=round(percentile_ms(values, 0.95), 5),
        cpu_ms=round(series.cpu_ns / len(values) / 1e6, 5),
        ratio=round(_ratio(series, baseline), 4),
        iterations=len(values),
    )


def _ratio(series: Series, baseline: Series) -> float:
    """Median over rounds of p50 by the baseline's p50 of the same round."""
    return statistics.median(
        percentile_ms(mine, 0.5) / percentile_ms(theirs, 0.5)
        for mine, theirs in zip(series.rounds, baseline.rounds, strict=True)
    )


def _row(r: Measured) -> list[str]:
    return [
        r.model,
        f"{r.p50_ms:.3f}",
        f"{r.p95_ms:.3f}",
        f"{r.ratio:.3f}",
        f"{r.load_ms:.1f}",
        f"{r.peak_rss_bytes / 1e6:.1f}",
        f"{r.cpu_ms:.3f}",
        f"{r.size_bytes / 1e3:.1f}",
    ]
