"""The command line of `edge-optimize`. It parses and prints; the work is imported when a command runs."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from edge_contract.console import Program, json_option, print_json
from edge_contract.errors import InputRejected, Reason

# Only said to exist by the optimizer itself, so that a missing file ends like any other bad input.
FILE = click.Path(path_type=Path)


def _complete_profile(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shipped profiles whose names begin so; files where none does."""
    from optimizer import profile

    found = [CompletionItem(name) for name in profile.names() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


@click.group("edge-optimize", cls=Program, brought_by="edgeward[optimizer]")
def main() -> None:
    """Find the smallest, fastest form of a model that keeps its accuracy on a kind of device."""


@main.command(short_help="Optimize a model for a device profile.")
@click.argument("model", type=FILE)
@click.option(
    "--profile",
    required=True,
    metavar="NAME|FILE",
    shell_complete=_complete_profile,
    help="Device profile: one of `edge-optimize profiles`, or a TOML file.",
)
@click.option("--calibration", required=True, type=FILE, help="NPZ whose samples set the quantizers' ranges.")
@click.option("--selection", required=True, type=FILE, help="NPZ that candidates are compared on.")
@click.option("--test", required=True, type=FILE, help="NPZ the chosen one is scored on, once.")
@click.option(
    "--metric",
    default="top1",
    show_default=True,
    metavar="top1|FILE.py:FUNCTION",
    help="What accuracy is; the function gets outputs and data by name.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    default=0.01,
    show_default=True,
    help="How much worse than FP32 it may be on the selection split, in the metric's own unit.",
)
@click.option("--name", help="The model's name in the bundle; default: from the file's name.")
@click.option("--model-version", default="1", show_default=True, help="The model's version in the bundle.")
@click.option(
    "--release",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Release counter; devices refuse to go back behind one they have seen.",
)
@click.option(
    "--probation",
    type=FILE,
    help="TOML of what a device holds this model to while it is new, where not to its own.",
)
@click.option("--output", required=True, type=FILE, metavar="DIR", help="Folder for bundle and reports.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the bootstrap.")
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="How long one candidate may take in one step before it is given up.",
)
@json_option
def run(
    model: Path,
    profile: str,
    calibration: Path,
    selection: Path,
    test: Path,
    metric: str,
    max_drop: float,
    name: str | None,
    model_version: str,
    release: int,
    output: Path,
    seed: int,
    timeout_s: float,
    probation: Path | None,
    as_json: bool,
) -> None:
    """Optimize MODEL (ONNX) for a device profile and write a bundle and a report.

    Each NPZ holds one array for each model input, under its name, and `label` with class indices for top1.
    The three must not share a sample.
    """
    _require_extra("numpy", "onnx", "onnxruntime", "onnxconverter_common", "matplotlib", "jinja2", "rich")
    from optimizer import measure, progress, table
    from optimizer.request import Request
    from optimizer.run import optimize, refusal

    request = Request(
        model=model,
        profile=profile,
        calibration=calibration,
        selection=selection,
        test=test,
        output=output,
        agent=measure.agent_command(),
        command=["edge-optimize", *sys.argv[1:]],
        metric=metric,
        max_drop=max_drop,
        name=name,
        version=model_version,
        release=release,
        seed=seed,
        timeout_s=timeout_s,
        probation=probation,
    )
    with progress.for_terminal() as steps:
        report = optimize(request, steps)
    refused = refusal(report, output)
    if not as_json:
        table.print_report(report, output)
    if refused:
        raise refused
    if as_json:
        import msgspec

        print_json({"ok": True, "output": str(output), "report": msgspec.to_builtins(report)})


@main.command()
@json_option
def profiles(as_json: bool) -> None:
    """List the device profiles that come with edgeward."""
    _require_extra("rich")
    import msgspec

    from optimizer import profile

    found = [profile.load(name) for name in profile.names()]
    if as_json:
        print_json({"ok": True, "profiles": msgspec.to_builtins(found)})
    else:
        from optimizer import shelf

        shelf.print_profiles(found)


def _require_extra(*modules: str) -> None:
    """The base install is a device's; what building needs comes with an extra. Raises InputRejected."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputRejected(
            Reason.RUNTIME_MISSING,
            f"this needs {', '.join(missing)}, not installed here",
            "install edgeward[optimizer] in this environment",
        )
