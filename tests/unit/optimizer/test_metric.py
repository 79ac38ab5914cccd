"""Top-1, functions of the user's, and intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_contract.errors import InputRejected, Reason
from optimizer import data as splits
from optimizer import metric
from optimizer.artifact import Artifact, open_model
from optimizer.metric import Score
from tests.unit.optimizer import nets
from tests.unit.optimizer.passes.graphs import model

SCORES = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return open_model(nets.save(tmp_path / "m.onnx", nets.classifier()), "onnxruntime")


@pytest.fixture
def four(artifact: Artifact, tmp_path: Path) -> splits.Split:
    """Four samples of the classes 0, 1, 0, 3."""
    path = nets.split(tmp_path / "s.npz", 4, seed=1, label=np.array([0, 1, 0, 3]))
    return splits.load(path, "selection", artifact)


def write(path: Path, body: str) -> str:
    path.write_text(f"import numpy as np\ndef score(outputs, data):\n    {body}\n")
    return f"{path}:score"


def test_top1(artifact: Artifact, four: splits.Split) -> None:
    found = metric.resolve("top1", artifact).score({"logits": SCORES}, four)
    assert found.value == 0.75
    assert found.per_sample is not None
    assert found.per_sample.tolist() == [1, 1, 0, 1]
    assert metric.classes(artifact) == 4


@pytest.mark.parametrize(
    ("body", "value", "per_sample"),
    [
        ("return (outputs['logits'].argmax(1) == data['label'])", 0.75, True),
        ("return float(data['image'].shape[0])", 4.0, False),
        ("return np.float32(0.5)", 0.5, False),
        ("return [1, 0, 0, 0]", 0.25, True),
    ],
)
def test_a_function_of_the_user(
    body: str, value: float, per_sample: bool, artifact: Artifact, four: splits.Split, tmp_path: Path
) -> None:
    found = metric.resolve(write(tmp_path / "mine.py", body), artifact)
    assert found.name == "mine.py:score"
    score = found.score({"logits": SCORES}, four)
    assert score.value == value
    assert (score.per_sample is not None) == per_sample


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('no such\\n class')", "raised on the selection split: ValueError: no such"),
        ("return outputs['probabilities']", "KeyError: 'probabilities'"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("return 'high'", "ValueError: could not convert string"),
        ("pass", "TypeError: it returned nothing"),
        ("return np.ones(3)", "an array of shape [3], finite, on the selection split"),
        ("return float('nan')", "one number of shape [], NaN or infinite in places"),
        ("return np.array([1, 2, np.inf, 4])", "NaN or infinite in places"),
    ],
)
def test_a_function_that_fails_is_named_with_its_line(
    body: str, words: str, artifact: Artifact, four: splits.Split, tmp_path: Path
) -> None:
    found = metric.resolve(write(tmp_path / "mine.py", body), artifact)
    with pytest.raises(InputRejected) as caught:
        found.score({"logits": SCORES}, four)
    assert caught.value.reason is Reason.METRIC_FAILED
    assert "mine.py:score" in caught.value.what
    assert words in caught.value.what


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        ("top5", Reason.BAD_INPUT, "unknown metric 'top5'"),
        ("{folder}/absent.py:score", Reason.BAD_INPUT, "absent.py is not a file"),
        ("{folder}/mine.py:other", Reason.BAD_INPUT, "has no function 'other'"),
        ("{folder}/mine.py:np", Reason.BAD_INPUT, "has no function 'np'"),
        ("{folder}/broken.py:score", Reason.METRIC_FAILED, "SyntaxError"),
        ("{folder}/raising.py:score", Reason.METRIC_FAILED, "RuntimeError: at import"),
    ],
)
def test_metrics_that_do_not_exist(
    text: str, reason: Reason, words: str, artifact: Artifact, tmp_path: Path
) -> None:
    write(tmp_path / "mine.py", "return 1.0")
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "raising.py").write_text("raise RuntimeError('at import')\n")
    with pytest.raises(InputRejected) as caught:
        metric.resolve(text.format(folder=tmp_path), artifact)
    assert caught.value.reason is reason
    assert words in caught.value.what


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,3] x) => (float[N,3,1] y) { y = Unsqueeze(x, a) }",
        "g (float[N,1] x) => (float[N,1] y) { y = Relu(x) }",
        "g (int64[N,3] x) => (int64[N,3] y) { y = Abs(x) }",
    ],
)
def test_top1_needs_class_scores(text: str, tmp_path: Path) -> None:
    import onnx

    axes = onnx.numpy_helper.from_array(np.array([2]))
    given = model(text, a=axes) if "Unsqueeze" in text else model(text)
    artifact = open_model(nets.save(tmp_path / "m.onnx", given), "onnxruntime")
    with pytest.raises(InputRejected, match="needs float class scores") as caught:
        metric.resolve("top1", artifact)
    assert caught.value.reason is Reason.BAD_INPUT


def score(values: list[float]) -> Score:
    return Score(float(np.mean(values)), np.asarray(values, np.float64))


def test_the_interval_is_paired_and_seeded() -> None:
    rng = np.random.default_rng(0)
    right = (rng.random(1000) < 0.9).astype(float)
    worse = right.copy()
    worse[:20] = 0
    interval = metric.paired_interval(score(list(right)), score(list(worse)), seed=1)
    assert interval is not None
    low, high = interval
    drop = float(right.mean() - worse.mean())
    # The normal approximation of the paired difference, within the bootstrap's own error.
    spread = 1.96 * float((right - worse).std()) / 1000**0.5
    assert low == pytest.approx(drop - spread, abs=0.003)
    assert high == pytest.approx(drop + spread, abs=0.003)
    assert interval == metric.paired_interval(score(list(right)), score(list(worse)), seed=1)
    # Samples that both get wrong or right say nothing: unpaired, the interval would be far wider.
    assert high - low < 0.02


def test_no_interval_without_scores_for_each_sample() -> None:
    assert metric.paired_interval(Score(1.0, None), score([1, 0]), seed=0) is None


def test_equal_scores_have_no_width() -> None:
    assert metric.paired_interval(score([1, 0, 1]), score([1, 0, 1]), seed=0) == (0.0, 0.0)
