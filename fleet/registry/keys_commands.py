"""The command line of `edge-fleet registry keys`. It parses and prints; the work is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_contract.console import json_option, print_json
from fleet import options
from fleet.registry import arguments

if TYPE_CHECKING:
    from fleet.registry.rotation import Change, Changed

_ROLE = click.argument("role", metavar="ROLE")
_THRESHOLD = click.option(
    "--threshold", type=click.IntRange(1, 16), help="How many of the keys have to sign.  [default: as before]"
)
_LABEL = click.option("--label", default="", help="Name of a new operator key, for people.")


def _new_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (
        click.option(
            "--uri",
            "uris",
            multiple=True,
            metavar="URI",
            help="Use a key in a module or cloud: hsm:, awskms:, gcpkms:, azurekms:. Repeat for several.",
        ),
        click.option(
            "--public",
            "publics",
            multiple=True,
            type=options.PATH,
            metavar="FILE",
            help="Use a key that somebody else keeps, by its public PEM file. Repeat for several.",
        ),
        _THRESHOLD,
        _LABEL,
        arguments.insecure,
    ):
        command = decorate(command)
    return command


@click.group()
def keys() -> None:
    """Show, make, replace, add and remove keys.

    ROLE is root, targets, snapshot, timestamp, operator or team-NAME. Root, targets, snapshot and timestamp
    are named by the root, so changing them needs root keys; operators and teams need targets keys.
    """


@keys.command("list")
@arguments.folder
@arguments.keys
@click.option("--check", is_flag=True, help="Open the private keys, and say which file holds which key.")
@json_option
def list_keys(
    folder: Path, keys_folders: tuple[Path, ...], password_file: Path | None, check: bool, as_json: bool
) -> None:
    """List roles, their keys, thresholds and expiries.

    They are read from the signed metadata of DIR.
    """
    from fleet import render
    from fleet.registry import inspection, repository

    keyring = arguments.keyring(folder, keys_folders, password_file)
    roles = inspection.roles(repository.Repository(folder, keyring), keyring, check=check)
    if as_json:
        print_json({"roles": [inspection.to_plain(role) for role in roles]})
    else:
        render.print_table(render.keys_table(roles))


@keys.command()
@click.argument("name")
@arguments.keys
@arguments.insecure
@json_option
def new(
    name: str,
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    insecure_no_password: bool,
    as_json: bool,
) -> None:
    """Make a key: NAME.pem, and NAME.pub to give away.

    For a team (team-NAME), an approver or an operator. Metadata has to name it: `delegate --key`,
    `approvers --add`, `keys add operator --public`.
    """
    from fleet.registry import keys as keyring
    from fleet.registry.password import Password

    folder = (*keys_folders, Path("keys"))[0]
    password = Password(password_file, insecure_none=insecure_no_password).new()
    private, public = keyring.new_pair(folder, name, password)
    arguments.warn(keyring.exposed([private]))
    if as_json:
        print_json({"ok": True, "private": str(private), "public": str(public)})
    else:
        click.echo(f"{private} is yours alone; give {public} to whoever signs the registry's metadata")


@keys.command()
@arguments.folder
@_ROLE
@arguments.keys
@click.option("--only", "ids", multiple=True, metavar="ID", help="Replace only this key. Repeat for several.")
@click.option("--count", type=click.IntRange(0, 16), help="How many keys to make.  [default: as many as go]")
@_new_options
@json_option
def rotate(
    folder: Path, role: str, ids: tuple[str, ...], count: int | None, as_json: bool, **given: Any
) -> None:
    """Replace the keys of ROLE by new ones.

    Everything that they have signed is signed anew. Devices follow by themselves. Old private keys are set
    aside, not deleted.
    """
    _change(folder, role, as_json, given, drop=ids or None, generate=count)


@keys.command()
@arguments.folder
@_ROLE
@arguments.keys
@click.option("--count", type=click.IntRange(0, 16), help="How many keys to make.  [default: 1, or none]")
@_new_options
@json_option
def add(folder: Path, role: str, count: int | None, as_json: bool, **given: Any) -> None:
    """Add keys to ROLE.

    With --count 0 and --threshold, change only how many have to sign.
    """
    others = given["publics"] or given["uris"]
    _change(folder, role, as_json, given, drop=(), generate=(0 if others else 1) if count is None else count)


@keys.command()
@arguments.folder
@_ROLE
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@arguments.keys
@_THRESHOLD
@json_option
def remove(folder: Path, role: str, ids: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Remove keys from ROLE.

    They are named by their ids or the beginnings of them.
    """
    _change(folder, role, as_json, given, drop=ids, generate=0)


def _change(
    folder: Path,
    role: str,
    as_json: bool,
    given: dict[str, Any],
    *,
    drop: Sequence[str] | None,
    generate: int | None,
) -> None:
    from fleet.registry import inspection, operators, repository, rotation, signers
    from fleet.registry.password import Password

    if given.get("label") and role != rotation.OPERATOR:
        raise click.UsageError("--label is for operator keys; other keys have no names")
    password = Password(given["password_file"], insecure_none=given.get("insecure_no_password", False))
    keyring = arguments.keyring(folder, given["keys_folders"], password)
    with repository.opened(folder, keyring) as repo:
        inspection.check_role(repo, role)
        if role == rotation.OPERATOR:
            operators.check_uris(given.get("uris", ()))
        wanted = rotation.Change(
            role,
            drop,
            generate,
            [signers.read_public(path) for path in given.get("publics", ())],
            [signers.import_public(uri, keyring.secret) for uri in given.get("uris", ())],
            given["threshold"],
            given.get("label", ""),
        )
        act = operators.change if role == rotation.OPERATOR else rotation.change
        changed = act(repo, keyring, wanted, password.again)
    if as_json:
        print_json({"ok": True, **_plain(wanted, changed)})
    else:
        click.echo(_summary(wanted, changed))
    arguments.warn(changed.warnings)


def _plain(wanted: Change, changed: Changed) -> dict[str, Any]:
    return {
        "role": wanted.role,
        "threshold": changed.threshold,
        "added": changed.added,
        "dropped": changed.dropped,
        "written": [str(path) for path in changed.written],
        "set_aside": [str(path) for path in changed.retired],
        "finished_earlier": changed.finished,
        "warnings": changed.warnings,
    }


def _summary(wanted: Change, changed: Changed) -> str:
    lines = [f"{wanted.role}: {len(changed.added)} keys added, {len(changed.dropped)} dropped,"]
    lines[0] += f" {changed.threshold} needed to sign"
    if changed.finished:
        lines.append("  this ended a change that was begun earlier; if you wanted another one, give it again")
    lines += [f"  new private key: {path}" for path in changed.written]
    lines += [f"  set aside, to be destroyed when you are sure: {path}" for path in changed.retired]
    return "\n".join(lines)
