"""report.html: one self-contained page made from a Report. No figure is computed here."""

from __future__ import annotations

import shlex
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from optimizer import plot, text, words
from optimizer.choose import REFERENCE, Broken, Choice, Scored
from optimizer.report import Report


def render(report: Report) -> str:
    """The page. It loads nothing from anywhere: styles and figures are inside."""
    source = files("optimizer").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(source)
    return template.render(
        r=report,
        chosen=report.chosen,
        title=f"{report.name}@{report.version} for {report.profile.name}",
        tiles=_tiles(report),
        rows=[_row(report, c) for c in report.candidates],
        # Our own SVG: its texts are candidate names and figures, escaped by matplotlib.
        scatter=Markup(plot.accuracy_over_latency(report)),  # noqa: S704
        bars=Markup(plot.size_and_memory(report)),  # noqa: S704
        note=plot.budget_note(report),
        command=shlex.join(report.command),
        size=text.size,
        ms=text.milliseconds,
        is_choice=isinstance(report.outcome, Choice),
        test=words.test_sentence(report),
    )


def _tiles(report: Report) -> list[dict[str, str]]:
    """The four figures that matter, for the chosen one or, after a refusal, the nearest."""
    name = report.outcome.name if isinstance(report.outcome, Choice) else report.outcome.nearest
    candidate = next(c for c in report.scored if c.name == name)
    reference = next(c for c in report.scored if c.name == REFERENCE)
    measured, budget = candidate.measured, report.profile.budget
    allowed = text.drop(report.max_drop, points=report.points)
    shrunk = measured.size_bytes / reference.measured.size_bytes
    return [
        {
            "label": "latency, FP32 = 1",
            "value": f"{measured.ratio:.2f}×",
            "note": f"p50 {text.milliseconds(measured.p50_ms)}, p95 {text.milliseconds(measured.p95_ms)}",
        },
        {
            "label": f"{report.metric} drop on selection",
            "value": text.drop(candidate.accuracy.drop, points=report.points),
            "note": f"{allowed} allowed{_interval_note(report, candidate, '; 95 %: ')}",
        },
        {
            "label": "file size",
            "value": text.size(measured.size_bytes),
            "note": f"{shrunk:.2f}× of FP32{_budget_note(budget.size_bytes)}",
        },
        {
            "label": "peak memory",
            "value": text.size(measured.peak_rss_bytes),
            "note": f"loads in {text.milliseconds(measured.load_ms)}{_budget_note(budget.memory_bytes)}",
        },
    ]


def _budget_note(limit: int | None) -> str:
    return f", budget {text.size(limit)}" if limit is not None else ""


def _interval_note(report: Report, candidate: Scored, lead: str = "") -> str:
    accuracy = candidate.accuracy
    if accuracy.drop_low is None or accuracy.drop_high is None:
        return ""
    low, high = (text.drop(v, points=report.points) for v in (accuracy.drop_low, accuracy.drop_high))
    return f"{lead}{low} to {high}"


def _row(report: Report, candidate: Scored | Broken) -> dict[str, Any]:
    verdict = next(v for v in report.outcome.verdicts if v.name == candidate.name)
    row = {"name": candidate.name, "settings": candidate.settings, "verdict": verdict, "figures": None}
    if isinstance(candidate, Scored):
        measured = candidate.measured
        row["sha256"] = measured.sha256
        row["figures"] = {
            "score": text.share(candidate.accuracy.value, points=report.points),
            "drop": text.drop(candidate.accuracy.drop, points=report.points),
            "interval": _interval_note(report, candidate),
            "p50": text.milliseconds(measured.p50_ms),
            "p95": text.milliseconds(measured.p95_ms),
            "ratio": f"{measured.ratio:.2f}×",
            "load": text.milliseconds(measured.load_ms),
            "memory": text.size(measured.peak_rss_bytes),
            "size": text.size(measured.size_bytes),
        }
    return row
