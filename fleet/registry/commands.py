"""The command line of `edge-fleet registry`. It parses and prints; the work is imported when it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_contract.console import json_option, print_json
from fleet import options
from fleet.registry import arguments, team_commands
from fleet.registry.deltas_commands import deltas
from fleet.registry.export_command import export
from fleet.registry.keys_commands import keys

if TYPE_CHECKING:
    from fleet.registry.repository import Layout
    from fleet.registry.signing import Periods

_ROLES = ("root", "targets", "snapshot", "timestamp")


def _expiry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for role in reversed(_ROLES):
        command = click.option(
            f"--expires-days-{role}",
            type=click.FloatRange(0, 36500, min_open=True),
            help=f"Days until {role} metadata expires.",
        )(command)
    return command


_COUNTED = ("root", "targets", "operator")


def _counts_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for role in reversed(_COUNTED):
        command = click.option(
            f"--{role}-threshold",
            type=click.IntRange(1, 16),
            default=1,
            show_default=True,
            help=f"How many of the {role} keys have to sign.",
        )(command)
        command = click.option(
            f"--{role}-keys",
            type=click.IntRange(1, 16),
            default=1,
            show_default=True,
            help=f"How many {role} keys to make.",
        )(command)
    return command


@click.group()
def registry() -> None:
    """Make, fill, renew, list and serve a registry.

    It is a TUF repository in a folder that any static web server can serve.
    """


registry.add_command(keys)
registry.add_command(export)
for _command in (
    deltas,
    team_commands.delegate,
    team_commands.revoke,
    team_commands.approvers,
    team_commands.approve,
):
    registry.add_command(_command)


@registry.command()
@arguments.folder
@arguments.keys
@_counts_options
@_expiry_options
@click.option("--operator-label", default="operator", show_default=True, help="Name of the operator key.")
@click.option("--insecure-no-password", is_flag=True, help="Leave the keys unencrypted. For trials only.")
@json_option
def init(
    folder: Path,
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    operator_label: str,
    insecure_no_password: bool,
    as_json: bool,
    **numbers: Any,
) -> None:
    """Make keys and an empty registry in DIR.

    Defaults of the expiries, in days: root 365, targets 90, snapshot 30, timestamp 7. They are kept in
    the signed root, and every later signature uses them.
    """
    from fleet.registry import repository
    from fleet.registry.keys import exposed
    from fleet.registry.password import Password

    keys_folder = (*keys_folders, options.keys_beside(str(folder)))[0]
    layout = _layout(numbers)
    repository.check_new(folder, keys_folder)
    password = Password(password_file, insecure_none=insecure_no_password).new()
    periods = _periods({key: days for key, days in numbers.items() if key.startswith("expires_days_")})
    repository.create(folder, keys_folder, password, operator_label, periods, layout)
    arguments.warn(exposed(sorted(keys_folder.glob("*.pem"))))
    if as_json:
        pinned = str(folder / "root.json")
        print_json({"ok": True, "registry": str(folder), "keys": str(keys_folder), "root": pinned})
    else:
        click.echo(_instructions(folder, keys_folder, periods))


@registry.command()
@arguments.folder
@click.argument("bundle_dir", required=False, type=options.PATH)
@click.option(
    "--delta-from",
    "delta_from",
    metavar="auto|none|VERSION",
    multiple=True,
    default=["auto"],
    show_default=True,
    help="Versions to make patches from, repeatable. auto: the newest three. none: only whole blobs.",
)
@arguments.keys
@click.option("--finish", metavar="MODEL@VERSION", help="Publish a version that has got its approvals.")
@json_option
def publish(
    folder: Path,
    bundle_dir: Path | None,
    delta_from: tuple[str, ...],
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    finish: str | None,
    as_json: bool,
) -> int:
    """Check the bundle in BUNDLE_DIR and publish it in DIR.

    Versions are immutable: publishing the same bundle again does nothing, other content under a
    published version is refused, and so is a release counter that does not rise. Where approvals are
    demanded, the version is staged until it has them; then publish it again, or with --finish, which exits
    with 3 while some are missing.
    """
    from fleet.registry import publish as publishing
    from fleet.registry import repository

    if (bundle_dir is None) == (finish is None):
        raise click.UsageError("give BUNDLE_DIR, or --finish MODEL@VERSION")
    bundle = None if bundle_dir is None else publishing.load(bundle_dir)
    keyring = arguments.keyring(folder, keys_folders, password_file)
    with repository.opened(folder, keyring) as repo:
        bundle = bundle or publishing.staged(repo, *options.reference(finish or ""))
        done = publishing.run(
            repo, bundle, keyring, lambda step: click.echo(f"  {step}", err=True), delta_from=delta_from
        )
    name = f"{bundle.manifest.name}@{bundle.manifest.version}"
    ok = finish is None or done.kind != "staged"
    if as_json:
        print_json(
            {
                "ok": ok,
                "published": done.kind == "published",
                "staged": done.kind == "staged",
                "model": name,
                "manifest_sha256": bundle.sha256,
                "approved_by": done.approved_by,
                "approvals_needed": done.needed,
            }
        )
    elif done.kind == "published":
        click.echo(f"published {name} (release {bundle.manifest.release}, {bundle.sha256[:12]})")
    elif done.kind == "already":
        click.echo(f"{name} is published already with this very content; nothing to do")
        if delta_from not in (("auto",), ("none",)):
            froms = " ".join(f"--from {version}" for version in delta_from if version not in ("auto", "none"))
            click.echo(f"for patches from other versions: edge-fleet registry deltas {folder} {name} {froms}")
    else:
        click.echo(
            f"staged {name} ({bundle.sha256[:12]}): {len(done.approved_by)} of {done.needed} approvals; "
            f"edge-fleet registry approve {folder} {name} BUNDLE_DIR --key FILE"
        )
    return 0 if ok else 3


@registry.command()
@arguments.folder
@arguments.keys
@_expiry_options
@click.option(
    "--also",
    multiple=True,
    metavar="ROLE",
    help="Sign this role anew too: root, targets or team-NAME. It needs its keys, usually kept offline.",
)
@click.option(
    "--if-expiring-within",
    "within_days",
    type=click.FloatRange(0),
    metavar="DAYS",
    help="Sign only what expires within so many days; exit with 3 if that leaves something unsigned.",
)
@json_option
def refresh(
    folder: Path,
    keys_folders: tuple[Path, ...],
    password_file: Path | None,
    also: tuple[str, ...],
    within_days: float | None,
    as_json: bool,
    **expires_days: float | None,
) -> int:
    """Sign snapshot and timestamp of DIR anew.

    Run it from a timer, before they expire. The expiries can be changed together with `--also root`, which
    keeps them.
    """
    from datetime import timedelta

    from fleet.registry import refresh as refreshing
    from fleet.registry import repository

    keyring = arguments.keyring(folder, keys_folders, password_file)
    given = {key: value for key, value in expires_days.items() if value is not None}
    if given and "root" not in also:
        raise click.UsageError("--expires-days-* are kept in the root: give --also root with them")
    within = None if within_days is None else timedelta(days=within_days)
    with repository.opened(folder, keyring) as repo:
        periods = _periods(given, repo.draft.periods)
        done = refreshing.refresh(repo, keyring, also, periods, within)
    if as_json:
        expiring = {role: expires.isoformat() for role, expires in done.expiring.items()}
        print_json({"ok": not expiring, "signed": done.signed, "expiring": expiring})
    else:
        click.echo(f"signed {', '.join(done.signed)}" if done.signed else "nothing to sign")
        for role, expires in done.expiring.items():
            click.echo(
                f"{role} expires on {expires:%Y-%m-%d %H:%M} UTC: sign it with --also {role}", err=True
            )
    return 3 if done.expiring else 0


@registry.command("list")
@click.argument("location", metavar="DIR|URL")
@click.option("--root", type=options.PATH, help="Pinned root.json; a URL needs it.  [default: DIR/root.json]")
@json_option
def list_versions(location: str, root: Path | None, as_json: bool) -> None:
    """List the models of a registry, verified from the pinned root."""
    import msgspec

    from fleet import render
    from fleet.registry.reader import Reader, root_of

    reader = Reader(location, root_of(location, root))
    published, catalogue = reader.published(), reader.catalogue
    pending, problems = reader.pending()
    if as_json:
        versions = [
            {
                "name": p.manifest.name,
                "version": p.manifest.version,
                "release": p.manifest.release,
                "runtime": p.manifest.runtime,
                "size_bytes": p.manifest.size_bytes,
                "manifest_sha256": p.sha256,
                "recipe": p.manifest.lineage.recipe,
                "profile": p.manifest.lineage.profile,
                "metrics": msgspec.to_builtins(p.manifest.lineage.metrics),
                "team": p.team,
                "approved_by": p.approved_by,
            }
            for p in published
        ]
        expires = catalogue.expires.isoformat()
        print_json(
            {
                "registry": location,
                "revision": catalogue.revision,
                "expires": expires,
                "expires_first": catalogue.first_to_expire,
                "models": versions,
                "expired_teams": catalogue.expired_teams,
                "refused_teams": catalogue.refused_teams,
                "pending": [team_commands.pending_plain(found, policy) for found, policy in pending],
                "pending_problems": problems,
            }
        )
        return
    if published:
        render.print_table(render.registry_table(published))
    else:
        click.echo("no model is published here yet")
    for team in catalogue.expired_teams:
        click.echo(f"team {team} has let its metadata expire; its models are not to be had", err=True)
    for team, why in catalogue.refused_teams.items():
        click.echo(f"team {team} has signed what it may not ({why}); its models are left out", err=True)
    for found, policy in pending:
        click.echo(team_commands.pending_line(found, policy))
    arguments.warn(map(render.clean, problems))
    click.echo(
        f"revision {catalogue.revision}, refresh before {catalogue.expires:%Y-%m-%d %H:%M} UTC: "
        f"then {catalogue.first_to_expire} expires"
    )


@registry.command()
@arguments.folder
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option("--access-log", is_flag=True, help="Log each request on standard error.")
@json_option
def serve(folder: Path, host: str, port: int, access_log: bool, as_json: bool) -> None:
    """Serve DIR over HTTP with Range and entity tags. For development: no TLS, no limits."""
    from fleet.lifetime import until_signalled
    from fleet.registry import server

    def ready(url: str) -> None:
        text = json.dumps({"url": url}) if as_json else f"serving {folder} at {url} (Ctrl-C ends it)"
        click.echo(text)

    with until_signalled() as asked:
        server.serve(folder, host, port, access_log=access_log, ready=ready, wait=asked.wait)


def _layout(numbers: dict[str, Any]) -> Layout:
    from fleet.registry.repository import Layout

    for role in _COUNTED:
        if numbers[f"{role}_threshold"] > numbers[f"{role}_keys"]:
            raise click.UsageError(
                f"--{role}-threshold {numbers[f'{role}_threshold']} is more than the keys of --{role}-keys"
            )
    return Layout(
        {role: numbers[f"{role}_keys"] for role in _COUNTED},
        {role: numbers[f"{role}_threshold"] for role in _COUNTED},
    )


def _periods(given: dict[str, Any], base: Periods | None = None) -> Periods:
    from msgspec.structs import replace

    from fleet.registry.signing import DAY_S, Periods

    seconds = {
        key.removeprefix("expires_days_"): max(1, round(days * DAY_S))
        for key, days in given.items()
        if days is not None
    }
    return replace(base or Periods(), **seconds)


def _instructions(folder: Path, keys_folder: Path, periods: Periods) -> str:
    root_days, timestamp_days = periods.root / 86400, periods.timestamp / 86400
    return f"""\
The registry is in {folder}, its keys are in {keys_folder}.

Keep offline, on a medium of their own with a copy, and bring back only when needed:
  {keys_folder}/root.pem       signs the root of trust; needed to renew it (every {root_days:.3g} days)
  {keys_folder}/targets.pem    signs what is published; needed by `registry publish`
Keep where you work, readable by you alone:
  {keys_folder}/operator.pem   signs what devices are told; needed by `deploy` and `command`
  {keys_folder}/snapshot.pem, timestamp.pem   needed by `registry publish` and `registry refresh`
Never put any of them into {folder} or on a device; lost passwords cannot be recovered.

Next:
  copy {folder}/root.json to each device; its agent pins it ([registry] root)
  edge-fleet registry publish {folder} BUNDLE_DIR
  edge-fleet registry refresh {folder}     at least every {timestamp_days:.3g} days, best from a timer"""
