"""`edge-fleet registry deltas`: patches for a version that is published already. It parses and prints."""

from __future__ import annotations

from pathlib import Path

import click

from edge_contract.console import json_option, print_json
from fleet import options
from fleet.registry import arguments


@click.command()
@arguments.folder
@click.argument("reference", metavar="MODEL@VERSION")
@click.option(
    "--from",
    "versions",
    metavar="VERSION",
    multiple=True,
    required=True,
    help="Make patches for devices that have this version; repeat it for more.",
)
@arguments.keys
@json_option
def deltas(
    folder: Path,
    reference: str,
    versions: tuple[str, ...],
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    as_json: bool,
) -> None:
    """Make patches for a published version.

    They let devices that have one of the versions named with --from download less. `publish` makes them
    from the newest versions before. Patches that would not save a third of the download are not kept.
    """
    from fleet.registry import deltas as making
    from fleet.registry import publish as publishing
    from fleet.registry import repository

    name, version = options.reference(reference)
    keyring = arguments.keyring(folder, keys_folders, password_file)
    with repository.opened(folder, keyring) as repo:
        published = publishing.published(repo, name)
        wanted = publishing.find(published, name, version)
        made = []
        for step in making.offer(repo, wanted, making.chosen(published, versions, wanted.manifest)):
            click.echo(f"  {step}", err=True)
            made.append(step)
        for role in repository.sign(repo, keyring):
            click.echo(f"  {role}", err=True)
    if as_json:
        print_json({"ok": True, "model": reference, "made": [step._asdict() for step in made]})
    else:
        click.echo(f"{reference}: {len(made)} new encodings")
