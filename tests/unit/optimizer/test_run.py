"""Whole runs against a double of edge-agent, whose figures are told."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from edge_contract import manifest as contract
from edge_contract.errors import EdgewardError, InputRejected, Reason, Refused
from optimizer import page, recipes, report
from optimizer.child import Children
from optimizer.choose import Broken, Choice, Refusal
from optimizer.progress import Lines
from optimizer.recipes import Plan
from optimizer.report import Report
from optimizer.request import Request, check
from optimizer.run import optimize, refusal
from optimizer.runtime import Model
from optimizer.worker import Build, Built
from tests.support import models
from tests.unit.optimizer import agent_double, conftest, nets
from tests.unit.optimizer.passes.graphs import model as graph

Make = Callable[..., Request]
Agent = Callable[..., list[str]]
FAST = {"static_int8_minmax": {"ratio": 0.5}, "dynamic_int8": {"ratio": 3.0}, "fp16": {"ratio": 1.2}}


def run(request: Request) -> Report:
    return optimize(request, Lines())


def blobs(folder: Path) -> set[str]:
    return {p.name for p in (folder / "bundle" / "blobs").rglob("*") if p.is_file()}


def manifest(folder: Path) -> contract.Manifest:
    return contract.from_bytes((folder / "bundle" / "manifest.json").read_bytes())


def plan_only(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = recipes.plan
    monkeypatch.setattr(recipes, "plan", lambda *args: Plan(real(*args).recipes[:count], []))


@pytest.fixture
def only_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """One candidate, for runs in which others do not matter."""
    plan_only(1, monkeypatch)


@pytest.fixture
def only_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 and static INT8."""
    plan_only(2, monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Report, Path]:
    """One run that ends well, for the tests that only look at it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "profile.toml").write_text(conftest.PROFILE.format(top="", budget="", quantization=""))
    (folder / "figures.json").write_text(json.dumps(FAST))
    made = run(
        Request(
            model=data / "model.onnx",
            profile=str(folder / "profile.toml"),
            calibration=data / "calibration.npz",
            selection=data / "selection.npz",
            test=data / "test.npz",
            output=folder / "out",
            agent=[sys.executable, agent_double.__file__, str(folder / "figures.json")],
            command=["edge-optimize", "run", "a model.onnx"],
        )
    )
    return made, folder / "out"


def test_the_fastest_accurate_candidate_is_chosen(whole: tuple[Report, Path]) -> None:
    made, folder = whole
    assert isinstance(made.outcome, Choice)
    assert made.outcome.name == "static_int8_minmax"
    assert made.outcome.decided_by == "latency"
    assert made.bench.gap is None
    assert refusal(made, folder) is None
    assert {v.name for v in made.outcome.verdicts} == {c.name for c in made.candidates}


def test_the_chosen_one_is_scored_once_on_the_test_split(whole: tuple[Report, Path]) -> None:
    made, folder = whole
    assert made.test is not None
    assert made.test.samples == 200
    assert made.test.value > 0.9
    assert made.test.drop_low is not None
    splits = [m.split for m in manifest(folder).lineage.metrics]
    assert splits == ["selection", "test"]


def test_the_report_can_be_read_back(whole: tuple[Report, Path]) -> None:
    made, folder = whole
    data = (folder / "report.json").read_bytes()
    assert report.from_json(data) == made
    document = json.loads(data)
    assert document["kind"] == "edge-optimize report"
    assert document["bundle_sha256"] == contract.canonical.sha256_hex(
        (folder / "bundle" / "manifest.json").read_bytes()
    )


def test_the_bundle_holds_the_chosen_file_and_its_own_answers(whole: tuple[Report, Path]) -> None:
    made, folder = whole
    found = manifest(folder)
    path = folder / "bundle" / contract.blob_path(found.file("model").sha256)
    assert path.read_bytes() == (folder / "candidates" / "static_int8_minmax.onnx").read_bytes()
    assert made.chosen is not None
    assert made.chosen.measured.sha256 == found.file("model").sha256
    with np.load(folder / "bundle" / contract.blob_path(found.file("golden").sha256)) as golden:
        answers = Model(path).run_all({"image": golden["input:image"]}, 1, fixed=False)
        np.testing.assert_allclose(golden["output:logits"], answers["logits"])
    assert sum(found.reference[0].top1_counts) == 200
    assert found.inputs == [contract.Tensor("image", "FP32", [-1, 1, 8, 8])]


def test_the_page_is_self_contained_and_tells_every_reason(whole: tuple[Report, Path]) -> None:
    made, folder = whole
    html = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", html)
    assert "url(" not in html.replace("url(#", "")
    assert "@import" not in html
    assert "<script" not in html
    assert html.count("<svg") == 2
    assert "prefers-color-scheme: dark" in html
    for verdict in made.outcome.verdicts:
        assert verdict.name in html
    assert "edge-optimize run &#39;a model.onnx&#39;" in html
    for digest in (
        made.source.sha256,
        made.profile_sha256,
        made.bundle_sha256,
        *(s.digest for s in made.splits),
    ):
        assert str(digest) in html


def test_names_in_the_page_are_escaped(whole: tuple[Report, Path]) -> None:
    made, _ = whole
    evil = replace(made, source=replace(made.source, path="<script>alert(1)</script>"))
    assert "<script" not in page.render(evil)


def test_the_same_input_gives_the_same_files(
    whole: tuple[Report, Path], request_for: Make, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was measured, and whatever the seed of Python's hashes."""
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    figures = {**FAST, "static_int8_minmax": {"ratio": 0.4, "peak_rss_bytes": 200_000_000}}
    request = request_for(agent=agent(**figures))
    run(request)
    one, other = whole[1], request.output
    assert blobs(one) == blobs(other)
    assert os.listdir(one / "candidates")
    for path in (one / "candidates").iterdir():
        assert path.read_bytes() == (other / "candidates" / path.name).read_bytes()
    first, second = (json.loads((f / "bundle" / "manifest.json").read_bytes()) for f in (one, other))
    assert first != second
    for found in (first, second):
        del found["expected"], found["needs"]["memory_bytes"]
    assert first == second


@pytest.mark.usefixtures("only_fp32")
def test_nothing_fits_and_the_bundle_of_an_earlier_run_goes(
    whole: tuple[Report, Path], request_for: Make, profile: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole[1], folder)
    made = run(request_for(profile=profile(budget="size_bytes = 100"), output=folder))
    assert isinstance(made.outcome, Refusal)
    error = refusal(made, folder)
    assert isinstance(error, Refused)
    assert error.reason is Reason.NOTHING_FITS
    assert error.exit_code == 3
    assert made.outcome.nearest in error.what
    assert "over the budget of 100 B by " in error.what
    assert not (folder / "bundle").exists()
    assert made.test is None
    assert "Nothing fits" in (folder / "report.html").read_text()
    assert report.from_json((folder / "report.json").read_bytes()) == made


@pytest.mark.usefixtures("only_two")
def test_on_another_kind_of_machine_the_profiles_order_decides(request_for: Make, agent: Agent) -> None:
    slow = {"static_int8_minmax": {"ratio": 9.0}, "static_int8_percentile": {"ratio": 9.0}}
    command = agent(**slow, machine={"isa": ["avx2", "avx512f"]})
    made = run(request_for(agent=command))
    assert isinstance(made.outcome, Choice)
    assert made.outcome.decided_by == "preference"
    assert made.outcome.name.startswith("static_int8")
    html = (request_for().output / "report.html").read_text()
    assert "Latencies here did not decide" in html
    assert "edge-agent bench --threads 1" in html


def test_candidates_that_fail_lose_with_their_reason_and_nothing_stays_behind(
    request_for: Make, agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Children.run

    def failing(self: Children, task: Any) -> Any:
        if isinstance(task, Build) and task.recipe.name == "fp16":
            return self.execute([sys.executable, "-c", "raise KeyError('Resize')"])
        if isinstance(task, Build) and task.recipe.name == "dynamic_int8":
            other = nets.classifier()
            other.graph.node[-1].output[0] = other.graph.output[0].name = "scores"
            nets.save(Path(task.target), other)
            return Built()
        return real(self, task)

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(Children, "run", failing)
    made = run(request_for(agent=agent(**FAST, static_int8_percentile={"failed": True})))
    broken = {c.name: c for c in made.candidates if isinstance(c, Broken)}
    stages = {name: c.stage for name, c in broken.items()}
    assert stages == {"fp16": "build", "dynamic_int8": "evaluate", "static_int8_percentile": "measure"}
    assert "differ from the model's in name" in broken["dynamic_int8"].what
    assert "KeyError: 'Resize'" in broken["fp16"].what
    assert broken["static_int8_percentile"].what == "no kernel for it"
    assert {v.name for v in made.outcome.verdicts if v.outcome == "failed"} == set(broken)
    assert isinstance(made.outcome, Choice)
    assert "no kernel for it" in (request_for().output / "report.html").read_text()
    assert os.listdir(scratch) == []


@pytest.mark.usefixtures("only_two")
def test_a_model_with_a_fixed_batch(request_for: Make, tmp_path: Path, agent: Agent) -> None:
    batch = 3
    path = nets.save(tmp_path / "fixed.onnx", nets.classifier(batch=batch))
    made = run(request_for(model=path, agent=agent(**FAST)))
    assert made.outcome.verdicts[0].outcome == "lost"
    found = manifest(tmp_path / "out")
    assert found.inputs[0].shape == [batch, 1, 8, 8]
    assert found.golden.samples * batch >= 8
    assert made.scored[0].accuracy.samples == 200


def test_a_model_that_is_quantized_already_is_bundled_as_it_is(
    whole: tuple[Report, Path], request_for: Make, tmp_path: Path
) -> None:
    given = whole[1] / "candidates" / "dynamic_int8.onnx"
    made = run(request_for(model=given))
    assert [c.name for c in made.candidates] == ["fp32"]
    assert {o.why for o in made.omitted} == {"the model is quantized already"}
    tolerance = manifest(tmp_path / "out").golden.tolerance
    assert tolerance.rtol == 0.0, "it rounds as INT8 does"
    # Alone as on a device: an answer must not depend on the batch it was computed in.
    before = next(c for c in whole[0].scored if c.name == "dynamic_int8")
    assert made.scored[0].accuracy.value == before.accuracy.value


def test_several_inputs_and_a_metric_of_ones_own(request_for: Make, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    path = nets.save(
        tmp_path / "two.onnx",
        graph("g (float[N,4] a, int64[N,4] b) => (float[N,4] y) { f = Cast <to = 1> (b)  y = Mul(a, f) }"),
    )
    for i, name in enumerate(("calibration", "selection", "test")):
        a, b = rng.normal(size=(30, 4)).astype(np.float32), rng.integers(0, 9, (30, 4))
        np.savez(tmp_path / f"{name}.npz", a=a, b=b, weight=np.full(30, i))
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def error(outputs, data):\n"
        "    assert data['weight'].shape == (30,)\n"
        "    return -np.abs(outputs['y'] - data['a'] * data['b']).max(axis=1)\n"
    )
    splits = {name: tmp_path / f"{name}.npz" for name in ("calibration", "selection", "test")}
    made = run(request_for(model=path, metric=f"{tmp_path / 'mine.py'}:error", **splits))
    assert made.metric == "mine.py:error"
    assert isinstance(made.outcome, Choice)
    assert [o.name for o in made.omitted] == ["static_int8_minmax", "static_int8_percentile", "dynamic_int8"]
    assert {t.name: t.datatype for t in manifest(tmp_path / "out").inputs} == {"a": "FP32", "b": "INT64"}
    assert manifest(tmp_path / "out").golden.tolerance.top1_agreement == 0.0


@pytest.mark.usefixtures("only_fp32")
@pytest.mark.parametrize(
    ("fault", "reason", "words"),
    [
        ("crash_at_load", Reason.CANDIDATE_CRASHED, "SIGFPE"),
        ("non_finite", Reason.NON_FINITE_OUTPUT, "NaN or infinite for 100 of 100 samples"),
    ],
)
def test_a_model_that_does_not_run_is_refused_before_anything_is_written(
    fault: models.Fault, reason: Reason, words: str, request_for: Make, tmp_path: Path
) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(models.tiny_net(fault=fault))
    splits = {}
    for i, name in enumerate(("calibration", "selection", "test")):
        x = models.samples(100, seed=i)
        splits[name] = tmp_path / f"{name}.npz"
        np.savez(splits[name], x=x, label=np.zeros(100, np.int64))
    with pytest.raises(InputRejected) as caught:
        run(request_for(model=path, **splits))
    assert caught.value.reason is reason
    assert str(path) in caught.value.what
    assert words in caught.value.what
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("only_fp32")
def test_an_operator_that_the_runtime_lacks(request_for: Make, tmp_path: Path) -> None:
    given = nets.classifier()
    given.graph.node[3].op_type, given.graph.node[3].domain = "Thing", "com.other"
    given.opset_import.append(onnx.helper.make_opsetid("com.other", 1))
    with pytest.raises(InputRejected, match=r"does not run: .*Thing") as caught:
        run(request_for(model=nets.save(tmp_path / "m.onnx", given)))
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.usefixtures("only_fp32")
def test_labels_beyond_the_classes_of_a_model_that_does_not_say(
    request_for: Make, data: Path, tmp_path: Path
) -> None:
    given = nets.classifier()
    given.graph.output[0].type.tensor_type.shape.dim[1].Clear()
    nets.split(tmp_path / "test.npz", 200, seed=9, label=np.full(200, 7))
    request = request_for(model=nets.save(tmp_path / "m.onnx", given), test=tmp_path / "test.npz")
    with pytest.raises(InputRejected, match="holds 7, expected classes from 0 to 3"):
        run(request)


@pytest.mark.usefixtures("only_fp32")
def test_a_time_limit_that_no_process_keeps(request_for: Make, tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"took longer than the 0\.01 s allowed") as caught:
        run(request_for(timeout_s=0.01))
    assert caught.value.reason is Reason.CANDIDATE_HUNG
    assert not (tmp_path / "out").exists()


def changed(data: Path, tmp_path: Path, name: str, **arrays: Any) -> Path:
    image, label = nets.images(200, seed=50)
    path = tmp_path / f"{name}.npz"
    np.savez(path, **{"image": image, "label": label, **arrays})  # type: ignore[arg-type]
    return path


def bad_requests() -> list[Any]:
    """(field, value maker, reason, words)"""
    image, label = nets.images(200, seed=50)
    nan = image.copy()
    nan[3] = np.nan
    return [
        ("profile", lambda d, t: "raspberry-pi-9", Reason.UNKNOWN_PROFILE, "raspberry-pi-9"),
        ("model", lambda d, t: t / "absent.onnx", Reason.MODEL_UNREADABLE, "absent.onnx"),
        ("max_drop", lambda d, t: float("nan"), Reason.BAD_INPUT, "--max-drop is nan"),
        ("timeout_s", lambda d, t: float("inf"), Reason.BAD_INPUT, "--timeout-s is inf"),
        ("metric", lambda d, t: "top5", Reason.BAD_INPUT, "top5"),
        ("name", lambda d, t: "Not A Name", Reason.BAD_INPUT, "Not A Name"),
        ("version", lambda d, t: "one two", Reason.BAD_INPUT, "one two"),
        ("calibration", lambda d, t: t / "absent.npz", Reason.DATA_MISMATCH, "absent.npz"),
        ("calibration", lambda d, t: d / "model.onnx", Reason.DATA_MISMATCH, "not a readable NPZ"),
        (
            "calibration",
            lambda d, t: nets.split(t / "c.npz", 15, 60),
            Reason.DATA_TOO_SMALL,
            "has 15 samples, 16 or",
        ),
        (
            "selection",
            lambda d, t: nets.split(t / "s.npz", 99, 60),
            Reason.DATA_TOO_SMALL,
            "allowed drop of 0.01",
        ),
        ("test", lambda d, t: nets.split(t / "s.npz", 99, 60), Reason.DATA_TOO_SMALL, "test split"),
        ("selection", lambda d, t: d / "test.npz", Reason.DATA_MISMATCH, "shares 200 samples"),
        ("calibration", lambda d, t: d / "selection.npz", Reason.DATA_MISMATCH, "shares 200 samples"),
        ("test", lambda d, t: changed(d, t, "x", image=nan), Reason.DATA_MISMATCH, "NaN"),
        (
            "test",
            lambda d, t: changed(d, t, "x", image=image[:, :, :4]),
            Reason.DATA_MISMATCH,
            "[200, 1, 4, 8]",
        ),
        ("test", lambda d, t: changed(d, t, "x", label=label + 1), Reason.DATA_MISMATCH, "'label' holds 4"),
        ("selection", lambda d, t: changed(d, t, "x", label=label * 1.0), Reason.DATA_MISMATCH, "float64"),
    ]


@pytest.mark.parametrize(("field", "make", "reason", "words"), bad_requests())
def test_bad_input_ends_before_anything_runs_or_is_written(
    field: str,
    make: Callable[[Path, Path], Any],
    reason: Reason,
    words: str,
    request_for: Make,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing_runs(*args: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(Children, "run", nothing_runs)
    with pytest.raises(InputRejected) as caught:
        run(request_for(**{field: make(data, tmp_path)}))
    assert caught.value.reason is reason
    assert words in caught.value.what
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("only_fp32")
def test_a_metric_that_raises_ends_the_run(request_for: Make, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(outputs, data):\n    raise ValueError('no decoder')\n")
    with pytest.raises(InputRejected, match="ValueError: no decoder") as caught:
        run(request_for(metric=f"{tmp_path / 'mine.py'}:score"))
    assert caught.value.reason is Reason.METRIC_FAILED
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("only_fp32")
def test_a_benchmark_that_breaks_ends_the_run(request_for: Make, agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(EdgewardError, match="ended with status 4: it broke"):
        run(request_for(agent=agent(exit=4)))
    assert not (tmp_path / "out").exists()


def test_a_name_is_taken_from_the_file(request_for: Make, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "My Net (v2).onnx"
    shutil.copy(data / "model.onnx", path)
    assert check(request_for(model=path)).name == "my-net-v2"
