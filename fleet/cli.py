"""The command line of `edge-fleet`. It parses and prints; each command's work is imported when it runs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_contract.console import Program, json_option, print_json
from edge_contract.errors import Reason, TransferFailed
from fleet import options
from fleet.certificates_commands import certificates
from fleet.registry.commands import registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_contract import wire
    from fleet.bus import Address
    from fleet.driver import Row
    from fleet.watch import Item

# edge_contract.wire.CommandName, repeated so that --help need not import it.
COMMANDS = ("status", "rollback", "bench", "clear-rejected")
_BENCH_WAIT_S, _WAIT_S = 330.0, 60.0
# A row that the device sent in vain comes again after half an hour at the latest.
_GAP_AFTER_S = 3600.0


@click.group("edge-fleet", cls=Program, brought_by="edgeward[fleet]")
def main() -> None:
    """Publish models, roll them out to devices, watch them.

    A first day: `registry init`, `registry publish`, `registry serve`, `devices`, `deploy`, `watch`.
    """


main.add_command(registry)
main.add_command(certificates)


@main.command()
@click.argument("reference", metavar="MODEL@VERSION")
@click.option("--device", "devices", multiple=True, required=True, metavar="ID", help="Repeat for several.")
@click.option(
    "--registry",
    "location",
    required=True,
    metavar="DIR|URL",
    envvar="EDGEWARD_REGISTRY",
    show_envvar=True,
    help="Where the version is published.",
)
@click.option("--root", type=options.PATH, help="Pinned root.json.  [default: the one beside the keys]")
@options.keys
@click.option(
    "--timeout-s", type=click.FloatRange(1), default=900.0, show_default=True, help="How long to follow."
)
@click.option(
    "--expires-s",
    type=click.IntRange(1, 366 * 86400),
    default=86400,
    show_default=True,
    help="For how long a device that is away may still take the order.",
)
@click.option("--allow-downgrade", is_flag=True, help="Also where a newer release has been committed before.")
@click.option(
    "--allow-interface-change",
    is_flag=True,
    help="Also where clients of the version that serves would notice.",
)
@options.broker
@json_option
def deploy(
    reference: str,
    devices: tuple[str, ...],
    location: str,
    root: Path | None,
    keys_folders: tuple[Path, ...],
    operator_key_files: tuple[Path, ...],
    key_password_file: Path | None,
    timeout_s: float,
    expires_s: int,
    allow_downgrade: bool,
    allow_interface_change: bool,
    address: Address,
    tenant: str,
    as_json: bool,
) -> int:
    """Send a published version to devices.

    Follows until each has committed, thrown out or refused it. Exits with 0 if all have committed, with 3
    if not.
    """
    from edge_contract import wire
    from fleet import render
    from fleet.bus import Bus
    from fleet.driver import Deployment, Order
    from fleet.registry.keys import Keys
    from fleet.registry.password import Password
    from fleet.registry.reader import Reader, root_of

    name, version = options.reference(reference)
    names = list(dict.fromkeys(options.identifier(device, "--device") for device in devices))
    keyring = Keys(keys_folders or options.keys_beside(location), Password(key_password_file).existing)
    reader = Reader(location, keyring.pinned_root() if root is None else root_of(location, root))
    digest = reader.find(name, version)
    model = wire.DesiredModel(name, version, digest, allow_downgrade, allow_interface_change)
    operators, keys = reader.operators(), keyring.operators(operator_key_files)
    order = Order(model, tenant, names, timeout_s, expires_s)
    with Bus(address) as bus:
        deployment = Deployment(bus, order, operators, keys)
        with render.progress(as_json=as_json) as progress:
            rows = deployment.run(progress.show)
    ok = all(getattr(row.view, "outcome", None) == "committed" for row in rows)
    if as_json:
        print_json({"ok": ok, "tenant": tenant, **_deployment(model, rows)})
    elif not sys.stdout.isatty():
        render.print_table(render.deployment_table(rows))
    return 0 if ok else 3


@main.command()
@click.option("--wait-s", type=click.FloatRange(0.1, 60), default=5.0, show_default=True, help="At most.")
@options.broker
@json_option
def devices(wait_s: float, address: Address, tenant: str, as_json: bool) -> None:
    """List devices and what they run.

    Every device is listed that has ever reported to the broker.
    """
    from fleet import render, roster
    from fleet.bus import Bus

    with Bus(address) as bus:
        found = roster.gather(tenant, bus.retained(roster.filters(tenant), wait_s))
    if as_json:
        print_json({"tenant": tenant, "devices": [roster.to_plain(device) for device in found]})
    elif found:
        render.print_table(render.devices_table(found, time.time_ns() // 1_000_000))
    else:
        click.echo(f"no device has reported to {address} under tenant {tenant!r} yet")


@main.command()
@click.option("--device", metavar="ID", help="Only this one.")
@click.option(
    "--db",
    type=options.PATH,
    envvar="EDGEWARD_DB",
    show_envvar=True,
    help="SQLite file for what is reported.  [default: ~/.config/edgeward/fleet.db]",
)
@click.option("--for-s", type=click.FloatRange(0.1), help="Stop after so many seconds.")
@click.option("--count", type=click.IntRange(1), help="Stop after so many new records.")
@click.option(
    "--gap-after-s",
    type=click.FloatRange(1),
    default=_GAP_AFTER_S,
    show_default=True,
    help="Wait so long for a missing row before it is reported.",
)
@options.broker
@json_option
def watch(
    device: str | None,
    db: Path | None,
    for_s: float | None,
    count: int | None,
    gap_after_s: float,
    address: Address,
    tenant: str,
    as_json: bool,
) -> None:
    """Store and show what devices report, as it comes.

    A device deletes a record from its outbox once it is stored here. With --json, one object a line.
    """
    from fleet import lines
    from fleet.bus import Bus
    from fleet.inventory import Inventory
    from fleet.lifetime import until_signalled
    from fleet.watch import Limits, Watcher

    def show(item: Item) -> None:
        if as_json:
            for value in lines.to_plain(item):
                click.echo(json.dumps(value))
        else:
            click.echo(lines.to_line(item, time.time_ns() // 1_000_000))

    only = None if device is None else options.identifier(device, "--device")
    path = db or Path(click.get_app_dir("edgeward")) / "fleet.db"
    with (
        until_signalled() as asked,
        Inventory(path, patience_ms=round(gap_after_s * 1000)) as inventory,
        Bus(address) as bus,
    ):
        Watcher(bus, inventory, tenant, only).run(Limits(for_s, count), asked, show)


@main.command()
@click.argument("name", type=click.Choice(COMMANDS))
@click.option("--device", required=True, metavar="ID", help="The device.")
@click.option("--arg", "pairs", multiple=True, metavar="KEY=VALUE", help="Repeat for several.")
@options.keys
@click.option("--timeout-s", type=click.FloatRange(1), help="How long to wait.  [default: 60, bench 330]")
@options.broker
@json_option
def command(
    name: wire.CommandName,
    device: str,
    pairs: tuple[str, ...],
    keys_folders: tuple[Path, ...],
    operator_key_files: tuple[Path, ...],
    key_password_file: Path | None,
    timeout_s: float | None,
    address: Address,
    tenant: str,
    as_json: bool,
) -> int:
    """Tell a device to do something once.

    `rollback` and `bench` want --arg model=NAME. Exits with 0 if it was done, with 1 if the device says no.
    """
    import msgspec

    from fleet import commanding, render
    from fleet.bus import Bus
    from fleet.registry.keys import Keys
    from fleet.registry.password import Password

    device = options.identifier(device, "--device")
    args = commanding.parse_args(pairs)
    keyring = Keys(keys_folders or options.keys_beside(None), Password(key_password_file).existing)
    keys = keyring.operators(operator_key_files)
    wait_s = timeout_s or (_BENCH_WAIT_S if name == "bench" else _WAIT_S)
    with Bus(address) as bus:
        result = commanding.send(
            bus, keys, tenant=tenant, device=device, name=name, args=args, timeout_s=wait_s
        )
    if as_json:
        print_json(msgspec.to_builtins(result))
    else:
        click.echo(render.result(device, result))
    return 0 if result.ok else 1


@main.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=1883, show_default=True, help="0 takes a free one."
)
@json_option
def broker(port: int, as_json: bool) -> None:
    """Run a development MQTT broker.

    MQTT 5 on loopback, without rights or persistence. For devices, use mosquitto or a cluster.
    """
    from fleet import broker as embedded
    from fleet.lifetime import until_signalled

    with until_signalled() as asked, embedded.running(port) as (number, running):
        where = f"{embedded.HOST}:{number}"
        click.echo(json.dumps({"broker": where}) if as_json else f"MQTT 5 broker at {where} (Ctrl-C ends it)")
        while not asked.wait(0.5):
            if not running.is_running:
                raise TransferFailed(
                    Reason.BROKER_UNREACHABLE, "the embedded broker has died", "start it again"
                )


def _deployment(model: wire.DesiredModel, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "model": model.name,
        "version": model.version,
        "manifest_sha256": model.manifest_sha256,
        "devices": [
            {
                "device": row.device,
                "outcome": getattr(row.view, "outcome", "no_answer"),
                "reason": row.view.reason.value,
                "detail": row.view.detail,
                "presence": row.presence,
                "serves": row.version,
                "generation": row.generation,
                "seconds": round(row.seconds, 2),
            }
            for row in rows
        ],
    }
