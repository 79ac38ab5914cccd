"""The figures of the report."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from edge_contract.bench import Measured
from edge_contract.profile import Budget
from optimizer import page, plot, words
from optimizer.choose import Accuracy, Choice, Scored, Verdict
from optimizer.passes.outcome import PassOutcome
from optimizer.report import Bench, Report, Source, SplitUsed
from tests.unit.edge_contract.samples import FACTS, PROFILE

NAMES = ("fp32", "static_int8_minmax", "static_int8_percentile", "dynamic_int8", "fp16")


def scored(name: str, p50_ms: float, value: float, size: int = 50_000) -> Scored:
    family = "static_int8" if name.startswith("static") else name
    measured = Measured(name, "c" * 64, size, 20.0, 70_000_000, p50_ms, p50_ms * 1.2, p50_ms, p50_ms, 100)
    accuracy = Accuracy(value, 0.92, 0.92 - value, 1000, -0.001, 0.002)
    return Scored(name, family, "settings", accuracy, measured)  # type: ignore[arg-type]


def make(*values: tuple[float, float], budget: Budget | None = None, metric: str = "top1") -> Report:
    candidates = [scored(name, *v) for name, v in zip(NAMES, values, strict=False)]
    verdicts = [Verdict(c.name, "won" if i == 1 else "lost", "because") for i, c in enumerate(candidates)]
    return Report(
        kind="edge-optimize report",
        schema=1,
        name="net",
        version="1",
        release=1,
        source=Source("net.onnx", "a" * 64, 100, 17, 10, {}, [], []),
        profile=replace(PROFILE, budget=budget or Budget()),
        profile_sha256="b" * 64,
        splits=[SplitUsed("selection", "s.npz", 1000, "d" * 64)],
        metric=metric,
        max_drop=0.01,
        interval="95 %",
        seed=0,
        passes=[PassOutcome("opset 17", "dropped", "kept opset 9: why")],
        omitted=[],
        candidates=list(candidates),
        outcome=Choice(NAMES[1], "latency", "because", verdicts),
        test=Accuracy(0.9, 0.92, 0.02, 500),
        bench=Bench(FACTS, 1, 10, 4.0, None),
        bundle_sha256="e" * 64,
        optimizer_version="0",
        command=["edge-optimize"],
        created="2026-01-01T00:00:00+00:00",
        duration_s=1.0,
    )


CLOSE = make((1.0, 0.92), (0.6, 0.92), (0.61, 0.919), (0.62, 0.919), (0.6, 0.9195))
FAR = make((1.0, 0.92), (0.6, 0.918), (0.61, 0.1), (12.0, 0.91), (1.01, 0.92))
SAME = make((1.0, 0.92), (1.0, 0.92), (1.0, 0.92), (1.0, 0.92), (1.0, 0.92))


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("report", [CLOSE, FAR, SAME, make((1.0, 0.92), (0.5, 0.92), metric="m.py:f")])
def test_figures_are_valid_svg_with_every_name_and_no_fixed_colour(report: Report) -> None:
    for svg in (plot.accuracy_over_latency(report), plot.size_and_memory(report)):
        ElementTree.fromstring(svg)
        assert {c.name for c in report.scored} <= set(texts(svg))
        colours = set(re.findall(r"#[0-9a-f]{6}\b", svg))
        assert colours == set(), "the page's variables colour everything"
        assert "var(--won)" in svg


def test_the_same_report_gives_the_same_figures() -> None:
    assert plot.accuracy_over_latency(FAR) == plot.accuracy_over_latency(FAR)


def test_budgets_are_drawn_where_they_are_near_and_told_where_not() -> None:
    near = replace(CLOSE, profile=replace(PROFILE, budget=Budget(latency_p95_ms=2.0, size_bytes=60_000)))
    far = replace(CLOSE, profile=replace(PROFILE, budget=Budget(latency_p95_ms=200.0, size_bytes=10**9)))
    assert "p95 budget 2 ms" in texts(plot.accuracy_over_latency(near))
    assert "budget 60.0 KB" in texts(plot.size_and_memory(near))
    assert plot.budget_note(near) == ""
    assert not any("p95 budget" in t for t in texts(plot.accuracy_over_latency(far)))
    assert not any("budget" in t for t in texts(plot.size_and_memory(far)))
    assert "200 ms" in plot.budget_note(far)
    assert "allowed drop 1.00 pt" in texts(plot.accuracy_over_latency(far))


def test_the_front_holds_what_no_other_beats() -> None:
    assert [c.name for c in plot.pareto(FAR.scored)] == ["static_int8_minmax", "fp32"]
    assert [c.name for c in plot.pareto(CLOSE.scored)] == ["static_int8_minmax"]


def test_the_page_shows_figures_verdicts_passes_and_lineage() -> None:
    html = page.render(CLOSE)
    for piece in ("0.60×", "70.0 MB", "kept opset 9: why", "e" * 64, "because", "-0.10 pt to 0.20 pt"):
        assert piece in html


def test_a_test_score_beyond_the_allowed_drop_is_pointed_out() -> None:
    assert words.test_sentence(CLOSE) == (
        "top1 90.00 % on 500 test samples (FP32 92.00 %, drop 2.00 pt):"
        " more than the 1.00 pt that the selection split was held to"
    )
    fine = replace(CLOSE, test=Accuracy(0.92, 0.92, 0.0, 500))
    assert "more than" not in words.test_sentence(fine)
    assert words.test_sentence(replace(CLOSE, test=None)) == ""
