"""Pure: sentences that the page and the terminal share."""

from __future__ import annotations

from optimizer import text
from optimizer.report import Report


def test_sentence(report: Report) -> str:
    """The one score on the test split, in words; empty where nothing was chosen."""
    test = report.test
    if test is None:
        return ""
    score = text.share(test.value, points=report.points)
    reference = text.share(test.fp32_value, points=report.points)
    lost = text.drop(test.drop, points=report.points)
    sentence = f"{report.metric} {score} on {test.samples} test samples (FP32 {reference}, drop {lost})"
    if test.drop > report.max_drop:
        allowed = text.drop(report.max_drop, points=report.points)
        sentence += f": more than the {allowed} that the selection split was held to"
    return sentence
