"""The command line of `edge-fleet certificates`. It parses and prints; the work is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_contract.console import json_option, print_json
from fleet import options

if TYPE_CHECKING:
    from fleet.certificates import Issued

_password_file = click.option(
    "--key-password-file",
    "password_file",
    type=options.PATH,
    help="File whose first line is the CA key's password; else EDGEWARD_KEY_PASSWORD, else you are asked.",
)
_folder = click.option(
    "--ca",
    "folder",
    type=options.PATH,
    default=Path("certificates"),
    show_default=True,
    help="Folder of the CA.",
)


@click.group()
def certificates() -> None:
    """Make certificates for the broker, devices and operators.

    A small CA for fleets that have none. The broker takes a certificate's name as the user's.
    """


@certificates.command()
@_folder
@_password_file
@click.option("--days", type=click.FloatRange(1), default=3650, show_default=True, help="Valid for so long.")
@click.option("--insecure-no-password", is_flag=True, help="Leave the key unencrypted. For trials only.")
@json_option
def init(
    folder: Path, password_file: Path | None, days: float, insecure_no_password: bool, as_json: bool
) -> None:
    """Make a CA.

    Whoever has its key can pose as any device to the broker: keep it with the registry's offline keys.
    """
    from fleet.certificates import init as make
    from fleet.registry.password import Password

    _print(
        make(folder, Password(password_file, insecure_none=insecure_no_password).new(), days=days), as_json
    )


@certificates.command()
@click.argument("name")
@_folder
@_password_file
@click.option("--days", type=click.FloatRange(), default=365, show_default=True, help="Valid for so long.")
@click.option("--host", "hosts", multiple=True, help="For a broker: a name or address of it. Repeat.")
@click.option("--out", type=options.PATH, help="Folder for the files.  [default: that of the CA]")
@json_option
def issue(
    name: str,
    folder: Path,
    password_file: Path | None,
    days: float,
    hosts: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Make a certificate and its key.

    NAME is a device's id, an operator, or with --host a broker. The same name again renews it, for the same
    hosts if no others are given: copy both files to the device, which takes them without a restart.
    """
    from fleet.certificates import issue as make
    from fleet.registry.password import Password

    name = options.identifier(name, "NAME")
    _print(make(folder, name, Password(password_file).existing, days=days, hosts=hosts, out=out), as_json)


def _print(issued: Issued, as_json: bool) -> None:
    if as_json:
        until_ms = int(issued.until.timestamp() * 1000)
        print_json(
            {
                "certificate": str(issued.certificate),
                "key": str(issued.key),
                "until_ms": until_ms,
                "hosts": list(issued.hosts),
            }
        )
    else:
        hosts = f" for a broker at {', '.join(issued.hosts)}" if issued.hosts else ""
        click.echo(f"{issued.certificate} and {issued.key}{hosts}, valid until {issued.until:%Y-%m-%d}")
