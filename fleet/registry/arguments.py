"""Arguments and options that the commands of `edge-fleet registry` share. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet import options

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fleet.registry.keys import Keys
    from fleet.registry.password import Password

folder = click.argument("folder", metavar="DIR", type=options.PATH)


def keys(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where private keys are: the command gets `keys_folders` and `password_file`."""
    command = click.option(
        "--key-password-file",
        "--password-file",
        "password_file",
        type=options.PATH,
        help="File whose first line is the keys' password; else EDGEWARD_KEY_PASSWORD, else you are asked.",
    )(command)
    return click.option(
        "--keys",
        "keys_folders",
        type=options.PATH,
        multiple=True,
        envvar="EDGEWARD_KEYS",
        show_envvar=True,
        help="Folder of private keys; repeat it where they lie apart.  [default: `keys` beside DIR]",
    )(command)


insecure = click.option(
    "--insecure-no-password", is_flag=True, help="Leave new keys unencrypted. For trials only."
)


def keyring(folder: Path, keys_folders: tuple[Path, ...], password: Path | Password | None) -> Keys:
    """The folders of keys, by default the one beside the registry's folder."""
    from fleet.registry.keys import Keys
    from fleet.registry.password import Password

    known = password if isinstance(password, Password) else Password(password)
    return Keys(keys_folders or [options.keys_beside(str(folder))], known.existing)


def warn(problems: Iterable[str]) -> None:
    """What went well but not wholly, on standard error."""
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)


def private_key(path: Path, password_file: Path | None) -> Ed25519PrivateKey:
    """One private key by its file. Raises InputRejected."""
    from fleet.registry import keys as keyrings
    from fleet.registry.password import Password

    return keyrings.open_private(path, Password(password_file).existing)
