"""What a run prints for people: the candidates in a table, the choice, the test score, where things lie."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from optimizer import output, terminal, text, words
from optimizer.choose import Choice, Scored, Verdict
from optimizer.report import Report

_STYLES = {"won": "bold green", "lost": "", "failed": "red"}


def print_report(report: Report, folder: Path) -> None:
    """The whole outcome on standard output."""
    console = terminal.console()
    console.print(_candidates(report))
    for item in report.omitted:
        console.print(f"not built: {item.name}, {item.why}", markup=False)
    if report.bench.gap:
        console.print(gap_sentence(report, folder), markup=False)
    if isinstance(report.outcome, Choice):
        console.print(f"chosen: {report.outcome.name}, {report.outcome.why}", markup=False, style="bold")
        console.print(f"test: {words.test_sentence(report)}", markup=False)
        console.print(f"bundle: {folder / output.BUNDLE}", markup=False)
    console.print(f"report: {folder / output.REPORT_HTML}", markup=False)


def gap_sentence(report: Report, folder: Path) -> str:
    """That latencies did not decide, why, and how to measure on the device."""
    names = " ".join(f"{output.CANDIDATES}/{c.name}.onnx" for c in report.scored)
    return (
        f"latencies did not decide: this machine does not speak for {report.profile.name}:"
        f" {report.bench.gap};"
        f" to rank by latency, copy {folder / output.CANDIDATES} to the device and run there:"
        f" edge-agent bench --threads {report.profile.session.threads} {names}"
    )


def _candidates(report: Report) -> Table:
    title = f"{report.name}@{report.version} for {report.profile.name}"
    table = Table("candidate", title=title, title_justify="left")
    for name in (report.metric, "drop", "p50", "p95", "× FP32", "load", "memory", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    verdicts = {v.name: v for v in report.outcome.verdicts}
    for candidate in report.candidates:
        verdict = verdicts[candidate.name]
        cells = _figures(report, candidate) if isinstance(candidate, Scored) else [""] * 8
        table.add_row(candidate.name, *cells, _verdict_cell(verdict), style=_STYLES[verdict.outcome])
    return table


def _figures(report: Report, candidate: Scored) -> list[str]:
    measured = candidate.measured
    return [
        text.share(candidate.accuracy.value, points=report.points),
        text.drop(candidate.accuracy.drop, points=report.points),
        text.milliseconds(measured.p50_ms),
        text.milliseconds(measured.p95_ms),
        f"{measured.ratio:.2f}×",
        text.milliseconds(measured.load_ms),
        text.size(measured.peak_rss_bytes),
        text.size(measured.size_bytes),
    ]


def _verdict_cell(verdict: Verdict) -> str:
    # The winner's reason is the sentence below the table.
    return "won" if verdict.outcome == "won" else f"{verdict.outcome}: {verdict.why}"
