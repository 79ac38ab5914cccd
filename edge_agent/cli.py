"""The command line of `edge-agent`. It parses and prints; each command's work is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edge_agent import config as configuration
from edge_contract import canonical
from edge_contract.console import Program, json_option, print_json
from edge_contract.errors import BundleRejected

CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("/etc/edgeward/agent.toml"),
    show_default=True,
    envvar="EDGEWARD_CONFIG",
    help="The agent's TOML file.",
)


@click.group("edge-agent", cls=Program, brought_by="edgeward[onnx] or edgeward[tflite]")
def main() -> None:
    """Serve models on this device and keep them healthy.

    On a device, systemd runs `serve` and `run`; without systemd, `up` runs both.
    """


@main.command()
@CONFIG
def serve(config_path: Path) -> None:
    """Run the inference process (Open Inference Protocol on HTTP)."""
    from edge_agent.serving import server

    server.run(configuration.load(config_path))


@main.command()
@CONFIG
def run(config_path: Path) -> None:
    """Run the control process (MQTT, updates, telemetry)."""
    from edge_agent import app

    app.run(config_path, configuration.load(config_path))


@main.command()
@CONFIG
def up(config_path: Path) -> None:
    """Run `serve` and `run` together, where there is no systemd."""
    from edge_agent import supervisor

    supervisor.run(config_path, configuration.load(config_path))


@main.command()
@CONFIG
@json_option
def status(config_path: Path, as_json: bool) -> None:
    """Say what this device serves, what its disk says, and how the last update ended."""
    from edge_agent import status as truth

    found = truth.collect(configuration.load(config_path))
    if as_json:
        print_json(found)
    else:
        click.echo(truth.text(found))


@main.command("import")
@CONFIG
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("references", metavar="[MODEL@VERSION]...", nargs=-1)
@json_option
def import_(config_path: Path, source: Path, references: tuple[str, ...], as_json: bool) -> None:
    """Take versions from FILE, without a network: what `edge-fleet registry export` wrote.

    FILE is a tar or zip archive or a folder. It is trusted as the registry is: by signed metadata and
    digests. The next desired state that names these versions needs no network; one for this device that
    came with them is handed to the control process. Without MODEL@VERSION, everything that FILE lists.
    """
    from edge_agent.update import importing, progress_bar

    with progress_bar.shown(quiet=as_json) as show:
        done = importing.run(configuration.load(config_path), source, references, show)
    if as_json:
        print_json(importing.as_dict(done))
    else:
        click.echo(importing.sentence(done))


@main.command("fetch", hidden=True)
@CONFIG
@click.argument("name")
@click.argument("version")
@click.argument("digest")
@click.option("--min-release", type=click.IntRange(0), default=0, help="Refuse an older release.")
def fetch_child(config_path: Path, name: str, version: str, digest: str, min_release: int) -> int:
    """Bring one published version into the store. The control process runs this as a child."""
    from edge_agent.update import fetch

    return fetch.run_fetch(configuration.load(config_path), name, version, digest, min_release)


@main.command("trust", hidden=True)
@CONFIG
def trust_child(config_path: Path) -> int:
    """Refresh signed metadata and the operators' keys. The control process runs this as a child."""
    from edge_agent.update import fetch

    return fetch.run_trust(configuration.load(config_path))


@main.command("decode", hidden=True)
@click.argument("algorithm")
@click.argument("encoded", type=click.Path(path_type=Path))
@click.argument("result", type=click.Path(path_type=Path))
@click.argument("size_bytes", type=int)
@click.argument("sha256")
@click.argument("memory_bytes", type=int)
@click.option("--base", type=click.Path(path_type=Path))
def decode_child(
    algorithm: str,
    encoded: Path,
    result: Path,
    size_bytes: int,
    sha256: str,
    memory_bytes: int,
    base: Path | None,
) -> int:
    """Make a blob of an encoded one. The fetch child runs this as a child of its own."""
    from edge_agent.update import decode

    task = decode.Task(algorithm, encoded, base, result, size_bytes, sha256, memory_bytes)
    return decode.run_decode(task)


@main.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 1000), default=10, show_default=True)
@click.option(
    "--round-s",
    type=click.FloatRange(0.01, 60),
    default=0.2,
    show_default=True,
    help="Seconds each model runs in each round.",
)
@click.option("--inputs", type=click.Path(path_type=Path), help="NPZ of inputs; the first sample is used.")
@json_option
def bench(
    models: tuple[Path, ...], threads: int, rounds: int, round_s: float, inputs: Path | None, as_json: bool
) -> None:
    """Measure MODELS (files, bundle or store folders), in turn, each in a process of its own.

    The first is the baseline of the ratios. Loads, latency, CPU time and peak memory are those of the
    path that serves requests.
    """
    from edge_agent.serving import bench as benchmark

    report = benchmark.run(list(models), threads=threads, rounds=rounds, round_s=round_s, inputs=inputs)
    if as_json:
        click.echo(canonical.to_bytes(report).decode())
    else:
        click.echo(benchmark.table(report))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--latency-factor",
    type=click.FloatRange(1.0),
    default=5.0,
    show_default=True,
    help="How much slower than the manifest's expectation, scaled to this machine, is too slow.",
)
@click.option(
    "--memory-factor",
    type=click.FloatRange(1.0),
    default=2.0,
    show_default=True,
    help="How much more memory than the manifest's expectation is too much.",
)
@click.option(
    "--free-bytes",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="What must stay free on this machine while the version is loaded.",
)
@click.option(
    "--prepare",
    type=click.Path(path_type=Path),
    help="Make this machine's own form of a version that passes, below this folder.",
)
@click.option(
    "--prepare-bytes",
    type=click.IntRange(0),
    default=1 << 30,
    show_default=True,
    help="The most that such a form may take.",
)
@json_option
def preflight(
    folder: Path,
    latency_factor: float,
    memory_factor: float,
    free_bytes: int,
    prepare: Path | None,
    prepare_bytes: int,
    as_json: bool,
) -> None:
    """Load a version from its store FOLDER, run its golden vectors, compare, and report a verdict."""
    from edge_agent.serving import adapt
    from edge_agent.serving import preflight as check

    verdict = check.run(folder, check.Terms(latency_factor, memory_factor, free_bytes))
    # One line each: the control process reads lines. The verdict counts even if the second never comes.
    click.echo(json.dumps(check.verdict_dict(verdict)) if as_json else check.sentence(verdict))
    if not verdict.ok:
        raise SystemExit(BundleRejected.exit_code)
    if prepare is not None:
        adapted = adapt.run(folder, prepare, prepare_bytes)
        click.echo(json.dumps(adapted._asdict()) if as_json else adapted.what)
