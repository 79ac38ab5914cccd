"""The report's two figures as SVG text: accuracy over latency, and size and memory of each candidate.

Colours are written as CSS variables, so that the page decides on light or dark. matplotlib is imported
here alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from optimizer import labels, text
from optimizer.choose import REFERENCE, Scored
from optimizer.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins while drawing → the page's variables. matplotlib writes colours in lower-case hex.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--won)",
    "#050505": "var(--other)",
    "#060606": "var(--limit)",
}
_INK, _MUTED, _LINE, _WON, _OTHER, _LIMIT = _VARIABLES
_DPI = 72
_FONT_SIZE = 11
# A budget this far beyond the largest value is told in words: drawn, it would flatten the rest.
_FAR = 4.0
# Labels further from their disc than this, in pixels, get a line to it.
_LEADER_FROM = 12.0
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edge-optimize",
    "font.size": _FONT_SIZE,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "text.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def accuracy_over_latency(report: Report) -> str:
    """Each candidate as a disc at (p50, score), its area the file size, a whisker to its p95."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(9.6, 5.2), dpi=_DPI)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.08, 0.13, 0.89, 0.83))
        scored = report.scored
        areas = _areas(scored)
        _frame(axes, report)
        _front(axes, scored, report)
        for candidate, area in zip(scored, areas, strict=True):
            _disc(axes, candidate, area, report)
        _budget_lines(axes, report)
        _label(axes, scored, areas, report)
        return _svg(figure, "Score over p50 latency of every candidate that runs")


def size_and_memory(report: Report) -> str:
    """Two rows of bars: bytes of the file, and peak memory of the process that serves it."""
    scored = report.scored
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(9.6, 0.9 + 0.42 * len(scored)), dpi=_DPI)
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(left=0.2, right=0.95, top=0.86, bottom=0.06, wspace=0.3)
        budget = report.profile.budget
        _bars(left, report, "file size", [c.measured.size_bytes for c in scored], budget.size_bytes)
        _bars(right, report, "peak memory", [c.measured.peak_rss_bytes for c in scored], budget.memory_bytes)
        return _svg(figure, "File size and peak memory of every candidate that runs")


def budget_note(report: Report) -> str:
    """What the first figure leaves out: budgets far to the right of everything measured."""
    limit = report.profile.budget.latency_p95_ms
    if limit is None or _is_near(limit, [c.measured.p95_ms for c in report.scored]):
        return ""
    return f"The p95 budget of {text.milliseconds(limit)} lies far to the right of this figure."


def pareto(scored: Sequence[Scored]) -> list[Scored]:
    """The candidates that no other beats in both score and p50 latency, quickest first."""
    front: list[Scored] = []
    for candidate in sorted(scored, key=lambda c: (c.measured.p50_ms, -c.accuracy.value)):
        if not front or candidate.accuracy.value > front[-1].accuracy.value:
            front.append(candidate)
    return front


def _score(value: float, report: Report) -> float:
    return value * 100 if report.points else value


def _areas(scored: Sequence[Scored]) -> list[float]:
    """Disc areas in points², in proportion to the file sizes, the smallest still visible."""
    largest = max(c.measured.size_bytes for c in scored)
    return [max(50.0, 1500.0 * c.measured.size_bytes / largest) for c in scored]


def _frame(axes: Axes, report: Report) -> None:
    p50 = [c.measured.p50_ms for c in report.scored]
    p95 = [c.measured.p95_ms for c in report.scored]
    limit = report.profile.budget.latency_p95_ms
    right = max([*p95, limit] if limit is not None and _is_near(limit, p95) else p95)
    if right > 5 * min(p50):
        axes.set_xscale("log")
        axes.set_xlim(min(p50) / 2, right * 2)
        axes.xaxis.set_major_formatter(lambda value, _place: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _place: f"{value:g}" if _is_round(value) else "")
    else:
        margin = 0.3 * (right - min(p50)) + 0.02 * right
        axes.set_xlim(max(0, min(p50) - margin), right + margin)
    scores = [_score(c.accuracy.value, report) for c in report.scored]
    floor = scores[0] - _score(report.max_drop, report)
    low, high = min([*scores, floor]), max(scores)
    margin = 0.25 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("p50 latency, ms (whisker to p95)")
    axes.set_ylabel(f"{report.metric} on the selection split{', %' if report.points else ''}")
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def _is_round(value: float) -> bool:
    """Whether a tick of a logarithmic axis starts with 2 or 5."""
    return f"{value:e}"[0] in "25" and abs(value - float(f"{value:.0e}")) < 1e-9 * max(value, 1e-9)


def _front(axes: Axes, scored: Sequence[Scored], report: Report) -> None:
    front = pareto(scored)
    x = [c.measured.p50_ms for c in front]
    y = [_score(c.accuracy.value, report) for c in front]
    axes.plot(x, y, color=_MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)


def _disc(axes: Axes, candidate: Scored, area: float, report: Report) -> None:
    colour = _colour(candidate.name, report)
    y = _score(candidate.accuracy.value, report)
    measured = candidate.measured
    axes.plot([measured.p50_ms, measured.p95_ms], [y, y], color=colour, linewidth=1.5, zorder=3)
    axes.scatter([measured.p50_ms], [y], s=area, color=colour, alpha=0.75, linewidths=0, zorder=4)


def _budget_lines(axes: Axes, report: Report) -> None:
    floor = _score(report.scored[0].accuracy.fp32_value - report.max_drop, report)
    axes.axhline(floor, color=_LIMIT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    allowed = f"allowed drop {text.drop(report.max_drop, points=report.points)}"
    axes.annotate(
        allowed, (1, floor), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points",
        ha="right", color=_LIMIT, fontsize=_FONT_SIZE - 1,
    )  # fmt: skip
    limit = report.profile.budget.latency_p95_ms
    if limit is not None and _is_near(limit, [c.measured.p95_ms for c in report.scored]):
        axes.axvline(limit, color=_LIMIT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(
            f"p95 budget {text.milliseconds(limit)}", (limit, 1), xycoords=("data", "axes fraction"),
            xytext=(-4, -12), textcoords="offset points", ha="right", color=_LIMIT, fontsize=_FONT_SIZE - 1,
        )  # fmt: skip


def _label(axes: Axes, scored: Sequence[Scored], areas: Sequence[float], report: Report) -> None:
    points, whiskers = [], []
    for candidate, area in zip(scored, areas, strict=True):
        y = _score(candidate.accuracy.value, report)
        ends = [(candidate.measured.p50_ms, y), (candidate.measured.p95_ms, y)]
        (x_px, y_px), (end_px, _) = axes.transData.transform(ends)
        # 0.62 of the font size is a generous mean width of a letter.
        width = 0.62 * _FONT_SIZE * len(candidate.name)
        points.append(labels.Point(x_px, y_px, (area / math.pi) ** 0.5, width, _FONT_SIZE * 1.2))
        whiskers.append(labels.Box(x_px, y_px - 2, end_px + 2, y_px + 2))
    corners = axes.transAxes.transform([(0, 0), (1, 1)])
    frame = labels.Box(*corners[0], *corners[1])
    boxes = labels.place(points, frame, whiskers)
    for candidate, point, box in zip(scored, points, boxes, strict=True):
        _leader(axes, point, box)
        weight = "bold" if _is_won(candidate.name, report) else "normal"
        axes.annotate(
            candidate.name, ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), xycoords="figure pixels",
            ha="center", va="center", color=_INK, weight=weight, zorder=5,
        )  # fmt: skip


def _leader(axes: Axes, point: labels.Point, box: labels.Box) -> None:
    """A thin line from a disc to its label where the two are not next to each other."""
    x, y = min(max(point.x, box.x0), box.x1), min(max(point.y, box.y0), box.y1)
    if math.hypot(x - point.x, y - point.y) > point.radius + _LEADER_FROM:
        style = {"arrowstyle": "-", "color": _MUTED, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (point.x, point.y), (x, y), xycoords="figure pixels", textcoords="figure pixels",
                      arrowprops=style, zorder=5)  # fmt: skip


def _bars(axes: Axes, report: Report, title: str, values: Sequence[int], limit: int | None) -> None:
    names = [c.name for c in report.scored]
    rows = range(len(names))
    axes.barh(rows, values, height=0.6, color=[_colour(name, report) for name in names], alpha=0.85)
    axes.set_yticks(list(rows), names, color=_INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title, loc="left", color=_MUTED, fontsize=_FONT_SIZE)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    near = limit is not None and _is_near(limit, values)
    axes.set_xlim(0, 1.22 * max([*values, limit] if near and limit is not None else values))
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            text.size(value), (value, row), xytext=(4, 0), textcoords="offset points", va="center", color=_INK
        )
    if near and limit is not None:
        axes.axvline(limit, color=_LIMIT, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            f"budget {text.size(limit)}", (limit, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha="center", color=_LIMIT, fontsize=_FONT_SIZE - 1,
        )  # fmt: skip


def _is_near(limit: float, values: Sequence[float]) -> bool:
    return limit <= _FAR * max(values)


def _is_won(name: str, report: Report) -> bool:
    return report.chosen is not None and report.chosen.name == name


def _colour(name: str, report: Report) -> str:
    if _is_won(name, report):
        return _WON
    return _MUTED if name == REFERENCE else _OTHER


def _svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for stand_in, variable in _VARIABLES.items():
        drawn = drawn.replace(stand_in, variable)
    drawn = drawn.replace("'DejaVu Sans', ", "").replace("DejaVu Sans", "sans-serif")
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
