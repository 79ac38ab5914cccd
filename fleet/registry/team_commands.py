"""The command line of delegations, revocations and approvals. It parses and prints; the work is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_contract.console import json_option, print_json
from fleet import options
from fleet.registry import arguments

if TYPE_CHECKING:
    from fleet.registry.approvals import Pending, Policy

_KEPT = (
    "devices will not fetch it any more; one that serves it goes on until another version is deployed to it"
)


@click.command()
@arguments.folder
@click.argument("model_pattern")
@arguments.keys
@click.option("--team", required=True, metavar="NAME", help="The team; a known one gets these models too.")
@click.option(
    "--key",
    "publics",
    multiple=True,
    type=options.PATH,
    metavar="FILE",
    help="Public key that the team made with `keys new`. Repeat for several.  [default: one is made]",
)
@click.option(
    "--count", type=click.IntRange(1, 16), help="How many keys to make for a new team.  [default: 1]"
)
@click.option(
    "--threshold", type=click.IntRange(1, 16), help="How many of its keys have to sign.  [default: 1]"
)
@arguments.insecure
@json_option
def delegate(
    folder: Path,
    model_pattern: str,
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    team: str,
    publics: tuple[Path, ...],
    count: int | None,
    threshold: int | None,
    insecure_no_password: bool,
    as_json: bool,
) -> None:
    """Give models to a team with keys of its own.

    From then on only the team's keys sign versions of models that match MODEL_PATTERN, without the targets
    key. What is published of them already is signed by the team in the same step.
    """
    from fleet.registry import repository, signers, teams
    from fleet.registry.keys import exposed
    from fleet.registry.password import Password

    if publics and count:
        raise click.UsageError("give --key, or --count of keys to make")
    password = Password(password_file, insecure_none=insecure_no_password)
    keyring = arguments.keyring(folder, keys_folders, password)
    keys = [signers.read_public(path) for path in publics]
    with repository.opened(folder, keyring) as repo:
        wanted = teams.Team(team, model_pattern, keys, count, threshold)
        done = teams.delegate(repo, keyring, wanted, password.again)
    arguments.warn(exposed(done.written))
    if as_json:
        print_json(
            {
                "ok": True,
                "role": done.role,
                "moved": done.moved,
                "written": [str(path) for path in done.written],
            }
        )
    else:
        moved = options.counted(len(done.moved), "version")
        click.echo(f"models {model_pattern} are {done.role}'s; {moved} went with them")
        for path in done.written:
            click.echo(f"  its private key: {path}")


@click.command()
@arguments.folder
@click.argument("reference", metavar="[MODEL@VERSION]", required=False)
@arguments.keys
@click.option("--team", metavar="NAME", help="Take a delegation back instead of a version.")
@click.option("--adopt", is_flag=True, help="With --team: keep its versions, as the registry's own.")
@json_option
def revoke(
    folder: Path,
    reference: str | None,
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    team: str | None,
    adopt: bool,
    as_json: bool,
) -> None:
    """Take back a version or a team's delegation.

    A revoked version leaves the targets and never comes back: devices will not fetch it any more. One that
    serves it goes on until another version is deployed to it. A version that only awaits approvals is
    dropped.
    """
    from fleet.registry import approvals, publish, repository, teams

    if (reference is None) == (team is None) or (adopt and team is None):
        raise click.UsageError("give MODEL@VERSION, or --team NAME (with --adopt to keep its versions)")
    keyring = arguments.keyring(folder, keys_folders, password_file)
    with repository.opened(folder, keyring) as repo:
        if team is not None:
            names = teams.revoke(repo, keyring, team, adopt=adopt)
            kept = "the registry's own now" if adopt else "revoked with it"
            kept = f"{'is' if len(names) == 1 else 'are'} {kept}"
            text = f"team {team} signs nothing any more; {options.counted(len(names), 'version')} {kept}"
        else:
            name, version = options.reference(reference or "")
            if approvals.forget(repo.pending, name, version):
                names, text = [], f"{reference} awaits approvals no more; it was never published"
            else:
                publish.revoke(repo, keyring, name, version)
                names, text = [f"models/{name}/{version}.json"], f"{reference} is revoked: {_KEPT}"
    if as_json:
        print_json({"ok": True, "adopted" if adopt else "revoked": names})
    else:
        click.echo(text)


@click.command()
@arguments.folder
@arguments.keys
@click.option("--team", metavar="NAME", help="For this team's models instead of all others.")
@click.option("--needed", type=click.IntRange(0, 16), help="How many approvals a version needs.")
@click.option("--add", "added", multiple=True, metavar="LABEL=FILE", help="Name an approver's public key.")
@click.option("--remove", "removed", multiple=True, metavar="LABEL", help="Take an approver off the list.")
@json_option
def approvers(
    folder: Path,
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    team: str | None,
    needed: int | None,
    added: tuple[str, ...],
    removed: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show or set who approves versions, and how many it takes.

    It is kept in the signed targets metadata, so that setting it needs the targets key.
    """
    from fleet.registry import approving, repository

    keyring = arguments.keyring(folder, keys_folders, password_file)
    with repository.opened(folder, keyring) as repo:
        change = approving.PolicyChange(team, needed, added, removed)
        policy = approving.set_policy(repo, keyring, change)
    if as_json:
        print_json(
            {"ok": True, "needed": policy.needed, "approvers": [approving.to_plain(k) for k in policy.keys]}
        )
    else:
        names = ", ".join(key.label for key in policy.keys) or "nobody"
        click.echo(f"a version needs {options.counted(policy.needed, 'approval')}; {names} may approve")


@click.command()
@arguments.folder
@click.argument("reference", metavar="MODEL@VERSION")
@click.argument("bundle_dir", required=False, type=options.PATH)
@arguments.keys
@click.option("--key", type=options.PATH, required=True, metavar="FILE", help="The approver's private key.")
@click.option(
    "--manifest-sha256",
    metavar="HEX",
    help="Instead of BUNDLE_DIR: digest of the manifest that you looked at. The first 12 digits do.",
)
@click.option("--finish", is_flag=True, help="Publish it if that was the last one; needs the keys for it.")
@json_option
def approve(
    folder: Path,
    reference: str,
    bundle_dir: Path | None,
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    key: Path,
    manifest_sha256: str | None,
    finish: bool,
    as_json: bool,
) -> None:
    """Approve a version that was staged by `publish`.

    BUNDLE_DIR is your own copy, which you have looked at; if another one is staged, it is refused. The
    approval is a signature over the manifest's digest. It is verified when the version is signed into the
    targets, and published with it.
    """
    from fleet.registry import approving, publish, repository

    name, version = options.reference(reference)
    if (bundle_dir is None) == (manifest_sha256 is None):
        raise click.UsageError("say what you looked at: BUNDLE_DIR, your own copy, or --manifest-sha256")
    expected = manifest_sha256 or ""
    if bundle_dir is not None:
        expected = approving.digest_of(publish.load(bundle_dir), name, version)
    keyring = arguments.keyring(folder, keys_folders, password_file)
    with repository.opened(folder, keyring) as repo:
        private = arguments.private_key(key, password_file)
        found, policy = approving.approve(repo, name, version, private, expected)
        enough = len(found.given) >= policy.needed
        if finish and enough:
            bundle = publish.staged(repo, name, version)
            publish.run(repo, bundle, keyring, lambda step: click.echo(f"  {step}", err=True))
    if as_json:
        print_json({"ok": True, "published": finish and enough, **pending_plain(found, policy)})
    else:
        click.echo(f"published {reference}" if finish and enough else pending_line(found, policy))


def pending_line(found: Pending, policy: Policy) -> str:
    """For people."""
    from fleet.registry.approvals import labels

    by = f" by {', '.join(labels(found.given, policy))}" if found.given else ""
    name = f"{found.manifest.name}@{found.manifest.version}"
    return f"pending: {name} ({found.sha256[:12]}), {len(found.given)} of {policy.needed} approvals{by}"


def pending_plain(found: Pending, policy: Policy) -> dict[str, Any]:
    """For programs."""
    from fleet.registry.approvals import labels

    return {
        "name": found.manifest.name,
        "version": found.manifest.version,
        "manifest_sha256": found.sha256,
        "approved_by": labels(found.given, policy),
        "approvals_needed": policy.needed,
    }
