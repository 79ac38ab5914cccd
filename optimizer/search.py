"""From a checked request to measured candidates: clean up, build, run over the selection split, measure.

Every model runs in a child process (child.py, measure.py). What the figures mean is for choose.py to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx

from edge_contract.bench import BenchReport, Failed, Measured
from edge_contract.errors import InputRejected, Reason
from optimizer import bundle, data, evaluate, measure, metric, recipes, worker
from optimizer.artifact import describe
from optimizer.child import Children
from optimizer.choose import REFERENCE, Accuracy, Broken, Candidate, Scored
from optimizer.data import Split
from optimizer.evaluate import Inference
from optimizer.metric import Score
from optimizer.passes.outcome import PassOutcome
from optimizer.progress import Steps
from optimizer.recipes import Plan, Recipe
from optimizer.request import Checked
from optimizer.worker import Fault

Inputs = dict[str, str]


@dataclass(frozen=True, slots=True)
class Workplace:
    """A run at work: the request, a scratch folder with the splits' inputs, its processes, whom to tell."""

    checked: Checked
    scratch: Path
    inputs: dict[str, Inputs]
    children: Children
    steps: Steps

    @property
    def batch(self) -> int | None:
        """The model's fixed batch."""
        return self.checked.artifact.batch


@dataclass(frozen=True, slots=True)
class Clean:
    """The cleaned model, how it got there, and what to build from it."""

    path: Path
    passes: list[PassOutcome]
    plan: Plan


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate's file and what it answered on the selection split."""

    recipe: Recipe
    path: Path
    inference: Inference


@dataclass(frozen=True, slots=True)
class Found:
    """Every candidate with its figures or its fault, the files of the good ones, and the benchmark."""

    candidates: list[Candidate]
    tried: dict[str, Tried]
    bench: BenchReport


def workplace(checked: Checked, scratch: Path, steps: Steps) -> Workplace:
    """Lay the splits' inputs out as plain arrays, which child processes map instead of unpacking."""
    splits = (checked.calibration, checked.selection, checked.test)
    inputs: dict[str, Inputs] = {s.name: _store(s, scratch) for s in splits}
    return Workplace(checked, scratch, inputs, Children(checked.request.timeout_s), steps)


def clean_up(place: Workplace) -> Clean:
    """Clean the model up; a pass that kills the process is left out the next time. Raises InputRejected."""
    target, marker = place.scratch / "clean.onnx", place.scratch / "pass"
    crashed: list[str] = []
    place.steps.begin("cleaning up", 1)
    while True:
        marker.write_text("", encoding="utf-8")
        task = worker.Clean(
            model=str(place.checked.artifact.path),
            inputs=place.inputs["calibration"],
            batch=place.batch,
            target=str(target),
            marker=str(marker),
            crashed=crashed,
        )
        result = place.children.run(task)
        if isinstance(result, worker.Cleaned):
            break
        culprit = marker.read_text(encoding="utf-8")
        if not culprit:
            raise _unusable(place.checked, result)
        crashed.append(culprit)
    applied = [p.name for p in result.passes if p.status == "applied"]
    place.steps.end(", ".join(applied) or "nothing to do")
    plan = recipes.plan(place.checked.profile, describe(onnx.load(target)))
    return Clean(target, result.passes, plan)


def search(place: Workplace, clean: Clean) -> Found:
    """Build, run and measure every candidate of the plan. Raises InputRejected if FP32 itself fails."""
    tried: dict[str, Tried] = {}
    broken: dict[str, Broken] = {}
    place.steps.begin("building and checking candidates", len(clean.plan.recipes))
    results = place.children.map(
        lambda recipe: _try(place, clean.path, recipe), clean.plan.recipes, place.steps.reach
    )
    for result in results:
        if isinstance(result, Tried):
            tried[result.recipe.name] = result
        else:
            broken[result.name] = result
    place.steps.end(f"{len(tried)} of {len(clean.plan.recipes)} are usable")
    if REFERENCE in broken:
        raise _unusable(place.checked, Fault(broken[REFERENCE].reason, broken[REFERENCE].what))
    return _measured(place, clean.plan, tried, broken)


def accuracy(checked: Checked, split: Split, fp32: Inference, other: Inference) -> Accuracy:
    """The score of `other` on `split` beside FP32's. Raises InputRejected if the metric fails."""
    reference, score = checked.metric.score(fp32.outputs, split), checked.metric.score(other.outputs, split)
    return _accuracy(checked, split, reference, score)


def _accuracy(checked: Checked, split: Split, reference: Score, score: Score) -> Accuracy:
    interval = metric.paired_interval(reference, score, checked.request.seed)
    low, high = interval or (None, None)
    drop = reference.value - score.value
    return Accuracy(score.value, reference.value, drop, split.samples, low, high)


def infer(place: Workplace, tried_path: Path, recipe: Recipe, split: Split) -> Inference | Fault:
    """A candidate's outputs over `split`."""
    dynamic = "DynamicQuantizeLinear" in place.checked.artifact.facts.ops
    singly = dynamic or recipe.family == "dynamic_int8"
    return evaluate.infer(
        place.children, tried_path, place.inputs[split.name], batch=place.batch, singly=singly
    )


def _try(place: Workplace, clean: Path, recipe: Recipe) -> Tried | Broken:
    """Build a candidate in one process, load and run it from its file in another."""
    target = place.scratch / f"{recipe.name}.onnx"
    task = worker.Build(str(clean), recipe, place.inputs["calibration"], place.batch, str(target))
    built = place.children.run(task)
    if isinstance(built, Fault):
        return _broken(recipe, "build", built)
    inference = infer(place, target, recipe, place.checked.selection)
    if isinstance(inference, Fault):
        return _broken(recipe, "evaluate", inference)
    return Tried(recipe, target, inference)


def _measured(place: Workplace, plan: Plan, tried: dict[str, Tried], broken: dict[str, Broken]) -> Found:
    fp32 = tried[REFERENCE]
    _check_labels(place.checked, fp32.inference)
    _drop_other_interfaces(fp32, tried, broken)
    accuracies = _accuracies(place.checked, tried)
    order = [tried[r.name] for r in plan.recipes if r.name in tried]
    report = _bench(place, [t.path for t in order])
    for item, result in zip(order, report.results, strict=True):
        if isinstance(result, Failed):
            if item is fp32:
                raise _unusable(place.checked, Fault(result.reason, result.what))
            broken[item.recipe.name] = _broken(item.recipe, "measure", Fault(result.reason, result.what))
    figures = {t.recipe.name: r for t, r in zip(order, report.results, strict=True)}
    candidates: list[Candidate] = []
    for recipe in plan.recipes:
        figure = figures.get(recipe.name)
        if isinstance(figure, Measured):
            candidates.append(_scored(recipe, accuracies[recipe.name], figure))
        else:
            candidates.append(broken[recipe.name])
    return Found(candidates, tried, report)


def _accuracies(checked: Checked, tried: dict[str, Tried]) -> dict[str, Accuracy]:
    split = checked.selection
    reference = checked.metric.score(tried[REFERENCE].inference.outputs, split)
    return {
        name: _accuracy(checked, split, reference, checked.metric.score(t.inference.outputs, split))
        for name, t in tried.items()
    }


def _check_labels(checked: Checked, fp32: Inference) -> None:
    """Labels against the number of classes the model has turned out to have, where its file did not say."""
    if checked.metric.needs_labels:
        count = fp32.outputs[checked.artifact.outputs[0].name].shape[1]
        for split in (checked.selection, checked.test):
            data.require_labels(split, count)


def _drop_other_interfaces(fp32: Tried, tried: dict[str, Tried], broken: dict[str, Broken]) -> None:
    for name, item in list(tried.items()):
        if not evaluate.same_interface(fp32.inference.interface, item.inference.interface):
            what = "its inputs or outputs differ from the model's in name or type"
            broken[name] = _broken(item.recipe, "evaluate", Fault(Reason.MODEL_UNSUPPORTED, what))
            del tried[name]


def _bench(place: Workplace, models: list[Path]) -> BenchReport:
    sample = place.scratch / "sample.npz"
    count = place.batch or 1
    first = {name: value[:count] for name, value in place.checked.selection.inputs.items()}
    sample.write_bytes(bundle.npz_bytes(first))
    expected_s = measure.expected_s(len(models))
    place.steps.begin("measuring with edge-agent bench", expected_s)
    report = measure.bench(
        place.checked.request.agent,
        models,
        sample,
        threads=place.checked.profile.session.threads,
        timeout_s=place.children.timeout_s,
        waiting=place.steps.reach,
    )
    place.steps.end(f"{len(models)} models, {report.rounds} rounds in turn, {report.threads} thread(s)")
    return report


def _store(split: Split, scratch: Path) -> Inputs:
    paths = {}
    for i, (name, value) in enumerate(split.inputs.items()):
        path = scratch / f"{split.name}-{i}.npy"
        np.save(path, value)
        paths[name] = str(path)
    return paths


def _scored(recipe: Recipe, scored: Accuracy, figure: Measured) -> Scored:
    # The file's name says more to readers than the scratch folder's path.
    figure = msgspec.structs.replace(figure, model=recipe.name)
    return Scored(recipe.name, recipe.family, recipe.settings.settings, scored, figure)


def _broken(recipe: Recipe, stage: str, fault: Fault) -> Broken:
    return Broken(recipe.name, recipe.family, recipe.settings.settings, stage, fault.reason, fault.what)  # type: ignore[arg-type]


def _unusable(checked: Checked, fault: object) -> InputRejected:
    if not isinstance(fault, Fault):
        raise TypeError(fault)
    return InputRejected(
        Reason.MODEL_UNSUPPORTED if fault.reason == Reason.LOAD_FAILED else fault.reason,
        f"{checked.artifact.path} does not run: {fault.what}",
        "make sure that it runs in onnxruntime on this machine with these inputs",
    )
