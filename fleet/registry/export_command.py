"""The command line of `edge-fleet registry export`. It parses and prints."""

from __future__ import annotations

import time
from pathlib import Path

import click

from edge_contract import canonical
from edge_contract.console import json_option, print_json
from edge_contract.errors import InputRejected, Reason
from edge_contract.manifest import parse_reference
from fleet import options
from fleet.registry import arguments


@click.command()
@arguments.folder
@click.argument("references", metavar="MODEL@VERSION...", nargs=-1, required=True)
@click.option(
    "-o", "--output", required=True, type=options.PATH, help="A .tar or .zip file, else a new folder."
)
@click.option(
    "--desire",
    "devices",
    multiple=True,
    metavar="DEVICE",
    help="Sign an order for this device to serve exactly these versions. Repeat for several.",
)
@click.option("--tenant", default="default", show_default=True, help="Tenant of these devices.")
@click.option(
    "--generation",
    type=click.IntRange(1),
    help="Generation of the orders; must be above the devices' last.  [default: Unix time in milliseconds]",
)
@click.option(
    "--expires-days",
    type=click.FloatRange(0, 366, min_open=True),
    default=30.0,
    show_default=True,
    help="Days until the orders expire.",
)
@click.option("--root", type=options.PATH, help="Pinned root.json.  [default: DIR/root.json]")
@click.option(
    "--operator-key",
    "operator_key_files",
    type=options.PATH,
    multiple=True,
    metavar="FILE",
    help="Sign orders with this key; repeat it where several have to sign.  [default: those in --keys]",
)
@arguments.keys
@json_option
def export(
    folder: Path,
    references: tuple[str, ...],
    output: Path,
    devices: tuple[str, ...],
    tenant: str,
    generation: int | None,
    expires_days: float,
    root: Path | None,
    operator_key_files: tuple[Path, ...],
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    as_json: bool,
) -> None:
    """Write versions to a medium for `edge-agent import`.

    For devices without a network, or with one that is too slow.

    Keys are needed only with --desire: as many operators' as the registry demands.
    """
    from dataclasses import replace

    from fleet.registry import export as exporting
    from fleet.registry.reader import Reader, root_of

    wanted = [_parsed(reference) for reference in references]
    pinned = root_of(str(folder), root)
    found = exporting.collect(folder, pinned, wanted)
    if devices:
        now_ms = time.time_ns() // 1_000_000
        orders = exporting.desire(
            found,
            Reader(str(folder), pinned).operators(),
            arguments.keyring(folder, keys_folders, password_file).operators(operator_key_files),
            tenant=options.identifier(tenant, "--tenant"),
            devices=[options.identifier(device, "--desire") for device in devices],
            generation=generation or now_ms,
            now_ms=now_ms,
            expires_ms=now_ms + int(expires_days * 86_400_000),
        )
        found = replace(found, documents={**found.documents, **orders})
    exporting.write(found, output)
    expires = f"{found.expires:%Y-%m-%d %H:%M} UTC"
    if as_json:
        print_json(
            {
                "ok": True,
                "output": str(output),
                "versions": sorted(found.versions),
                "devices": list(devices),
                "size_bytes": found.size_bytes,
                "expires": found.expires.isoformat(),
                "expires_first": found.expires_first,
            }
        )
        return
    click.echo(f"{output}: {', '.join(found.versions)}, {found.size_bytes} bytes")
    click.echo(f"import it before {expires}: then its {found.expires_first} metadata expires")


def _parsed(reference: str) -> tuple[str, str]:
    try:
        return parse_reference(reference)
    except canonical.DecodeFault as e:
        raise InputRejected(Reason.BAD_INPUT, f"{reference!r}: {e.problem}", "write it like fashion@1") from e
