"""One run of `edge-optimize run`, from the request to the output folder. It composes; it decides nothing.

check → clean up → build, run and measure candidates → choose → score once on the test split → write
"""

from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_contract import canonical, manifest
from edge_contract.console import distribution_version
from edge_contract.errors import Reason, Refused
from edge_contract.profile import RecipeName
from optimizer import bundle, choose, evaluate, output, report, search
from optimizer import profile as profiles
from optimizer.artifact import Artifact
from optimizer.choose import REFERENCE, Accuracy, Choice, Refusal, Scored
from optimizer.data import Split
from optimizer.evaluate import Inference
from optimizer.progress import Steps
from optimizer.recipes import ModelFacts
from optimizer.report import Report
from optimizer.request import Checked, Request, check
from optimizer.search import Clean, Found, Tried, Workplace
from optimizer.worker import Fault


def optimize(request: Request, steps: Steps) -> Report:
    """Do the whole run; the output folder is filled when it returns, whether something was chosen or not.

    Raises InputRejected for what cannot be used and Refused where nothing could be measured; the output
    folder is then as it was.
    """
    started = time.monotonic()
    checked = check(request)
    with tempfile.TemporaryDirectory(prefix="edge-optimize-") as folder:
        place = search.workplace(checked, Path(folder), steps)
        clean = search.clean_up(place)
        found = search.search(place, clean)
        rules = choose.Rules(checked.profile, found.bench.machine, request.max_drop, checked.points)
        outcome = choose.choose(found.candidates, rules)
        test = _score_once(place, outcome, found.tried)
        made = _report(checked, clean, found, outcome, test, rules, time.monotonic() - started)
        return _write(place, made, found)


def _score_once(place: Workplace, outcome: Choice | Refusal, tried: dict[str, Tried]) -> Accuracy | None:
    """The chosen candidate and FP32 on the test split. Nothing is chosen by it."""
    if isinstance(outcome, Refusal):
        return None
    split = place.checked.test
    names = list(dict.fromkeys([REFERENCE, outcome.name]))
    place.steps.begin("scoring the chosen one on the test split", len(names))
    inferences = place.children.map(lambda n: _infer(place, tried[n], split), names, place.steps.reach)
    results = dict(zip(names, inferences, strict=True))
    scored = search.accuracy(place.checked, split, results[REFERENCE], results[outcome.name])
    place.steps.end(f"{split.samples} samples")
    return scored


def _infer(place: Workplace, tried: Tried, split: Split) -> Inference:
    result = search.infer(place, tried.path, tried.recipe, split)
    if isinstance(result, Fault):
        raise Refused(
            result.reason,
            f"{tried.recipe.name} ran on the selection split, not on the {split.name} split: {result.what}",
            f"look at the samples of {split.path}; nothing has been written",
        )
    return result


def _report(
    checked: Checked,
    clean: Clean,
    found: Found,
    outcome: Choice | Refusal,
    test: Accuracy | None,
    rules: choose.Rules,
    duration_s: float,
) -> Report:
    request = checked.request
    return Report(
        kind="edge-optimize report",
        schema=1,
        name=checked.name,
        version=request.version,
        release=request.release,
        source=_source(checked.artifact),
        profile=checked.profile,
        profile_sha256=profiles.digest(checked.profile),
        splits=[
            report.SplitUsed(s.name, str(s.path), s.samples, s.digest)
            for s in (checked.calibration, checked.selection, checked.test)
        ],
        metric=checked.metric.name,
        max_drop=request.max_drop,
        interval=report.INTERVAL,
        seed=request.seed,
        passes=clean.passes,
        omitted=clean.plan.omitted,
        candidates=found.candidates,
        outcome=outcome,
        test=test,
        bench=report.Bench(
            machine=found.bench.machine,
            threads=found.bench.threads,
            rounds=found.bench.rounds,
            reference_ms=found.bench.reference_ms,
            gap=choose.machine_gap(rules),
        ),
        bundle_sha256=None,
        optimizer_version=distribution_version(),
        command=list(request.command),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        duration_s=round(duration_s, 1),
    )


def _source(artifact: Artifact) -> report.Source:
    facts = artifact.facts
    return report.Source(
        path=str(artifact.path),
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        opset=facts.opset,
        parameters=facts.parameters,
        ops=facts.ops,
        inputs=list(artifact.inputs),
        outputs=list(artifact.outputs),
    )


def _write(place: Workplace, made: Report, found: Found) -> Report:
    """Fill the output folder; the report returned is the one in it."""
    from optimizer import page  # plotting takes a second to import, and bad input should not wait for it

    place.steps.begin("writing", 1)
    request = place.checked.request
    with output.staged(request.output) as folder:
        candidates = folder / output.CANDIDATES
        candidates.mkdir()
        for tried in found.tried.values():
            shutil.copyfile(tried.path, candidates / tried.path.name)
        if made.chosen is not None:
            document = _write_bundle(place, made, made.chosen, found, folder / output.BUNDLE)
            digest = canonical.sha256_hex(manifest.to_bytes(document))
            made = msgspec.structs.replace(made, bundle_sha256=digest)
        (folder / output.REPORT_JSON).write_bytes(report.to_json(made))
        (folder / output.REPORT_HTML).write_text(page.render(made), encoding="utf-8")
    place.steps.end(str(request.output))
    return made


def _write_bundle(
    place: Workplace, made: Report, chosen: Scored, found: Found, folder: Path
) -> manifest.Manifest:
    tried = found.tried[chosen.name]
    content = bundle.Content(
        name=made.name,
        version=made.version,
        release=made.release,
        profile=made.profile,
        precision=_precision(chosen, place.checked.artifact.facts),
        recipe=f"{chosen.name}: {chosen.settings}",
        model=tried.path.read_bytes(),
        # FP32's interface: what the model was exported with, whatever a quantizer forgot of the shapes.
        inputs=found.tried[REFERENCE].inference.interface.inputs,
        outputs=found.tried[REFERENCE].inference.interface.outputs,
        batch=place.batch,
        golden=_golden(place, tried),
        selection_outputs=tried.inference.outputs,
        measured=chosen.measured,
        reference_ms=made.bench.reference_ms,
        source_sha256=made.source.sha256,
        calibration_sha256=place.checked.calibration.digest,
        metrics=_metrics(made, chosen),
        probation=place.checked.probation,
    )
    folder.mkdir()
    return bundle.write(content, folder)


def _precision(chosen: Scored, given: ModelFacts) -> RecipeName:
    """How coarsely the file rounds; a model that came quantized or in half precision keeps that."""
    if chosen.name == REFERENCE and given.quantized:
        return "static_int8"
    return "fp16" if chosen.name == REFERENCE and given.half else chosen.family


def _golden(place: Workplace, tried: Tried) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs from the selection split and the chosen file's own answers, one sample at a time."""
    split = place.checked.selection
    places = bundle.golden_places(split.samples, place.batch)
    inputs = {name: value[places] for name, value in split.inputs.items()}
    paths = {}
    for i, (name, value) in enumerate(inputs.items()):
        path = place.scratch / f"golden-{i}.npy"
        np.save(path, value)
        paths[name] = str(path)
    result = evaluate.infer(place.children, tried.path, paths, batch=place.batch, singly=True)
    if isinstance(result, Fault):
        raise Refused(
            Reason.CANDIDATE_CRASHED,
            f"{tried.recipe.name} ran on the selection split, but not again on {len(places)} of its samples:"
            f" {result.what}",
            "run again; nothing has been written",
        )
    return {
        **{f"input:{name}": value for name, value in inputs.items()},
        **{f"output:{name}": value for name, value in result.outputs.items()},
    }


def _metrics(made: Report, chosen: Scored) -> list[manifest.Metric]:
    scores = [("selection", chosen.accuracy), ("test", made.test)]
    return [
        manifest.Metric(made.metric, split, a.value, a.fp32_value, a.samples)  # type: ignore[arg-type]
        for split, a in scores
        if a is not None
    ]


def refusal(made: Report, folder: Path) -> Refused | None:
    """The error a run without a choice ends with; None where something was chosen."""
    if isinstance(made.outcome, Choice):
        return None
    return Refused(
        Reason.NOTHING_FITS,
        made.outcome.why,
        f"read {folder / output.REPORT_HTML}; then widen that budget in the profile or --max-drop,"
        " or give a smaller model",
    )
