"""Options that several commands share. Each decorator turns its options into one finished value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_contract.errors import InputRejected, Reason

if TYPE_CHECKING:
    from fleet.bus import Address

Command = Callable[..., Any]

PATH = click.Path(path_type=Path)
PORT = click.IntRange(0, 65535)


def broker(command: Command) -> Command:
    """Broker and tenant: the command gets `address` and `tenant`."""

    @click.option(
        "--broker",
        envvar="EDGEWARD_BROKER",
        show_envvar=True,
        default="127.0.0.1:1883",
        show_default=True,
        metavar="HOST:PORT",
        help="The MQTT 5 broker.",
    )
    @click.option("--tls-ca", type=PATH, help="CA certificates of the broker, PEM; switches TLS on.")
    @click.option("--tls-cert", type=PATH, help="Client certificate, PEM.")
    @click.option("--tls-key", type=PATH, help="Key of the client certificate, PEM.")
    @click.option("--username", default="", help="User at the broker.")
    @click.option("--password-file", type=PATH, help="File whose first line is the broker's password.")
    @click.option(
        "--tenant",
        envvar="EDGEWARD_TENANT",
        show_envvar=True,
        default="default",
        show_default=True,
        help="First level of the topics.",
    )
    @functools.wraps(command)
    def wrapped(
        *,
        broker: str,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        username: str,
        password_file: Path | None,
        tenant: str,
        **rest: Any,
    ) -> Any:
        address = _address(broker, tls_ca, tls_cert, tls_key, username, password_file)
        return command(address=address, tenant=identifier(tenant, "--tenant"), **rest)

    return wrapped


def keys(command: Command) -> Command:
    """Where an operator's keys are: `keys_folders`, `operator_key_files` and `key_password_file`."""
    command = click.option(
        "--key-password-file",
        type=PATH,
        help="File whose first line is the keys' password; else EDGEWARD_KEY_PASSWORD, else you are asked.",
    )(command)
    command = click.option(
        "--operator-key",
        "operator_key_files",
        type=PATH,
        multiple=True,
        metavar="FILE",
        help="Sign with this private key; repeat it where several have to sign.  [default: those in --keys]",
    )(command)
    return click.option(
        "--keys",
        "keys_folders",
        type=PATH,
        multiple=True,
        envvar="EDGEWARD_KEYS",
        show_envvar=True,
        help="Folder of private keys; may be repeated.  [default: `keys` beside the registry, or ./keys]",
    )(command)


def keys_beside(registry: str | None) -> Path:
    """The default folder of keys: beside a registry's folder, or here."""
    if registry is None or registry.startswith(("http://", "https://")):
        return Path("keys")
    return Path(registry).parent / "keys"


def counted(count: int, noun: str) -> str:
    """`1 version`, `2 versions`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def reference(text: str) -> tuple[str, str]:
    """MODEL@VERSION. Raises InputRejected."""
    from edge_contract import canonical
    from edge_contract.manifest import parse_reference

    try:
        return parse_reference(text)
    except canonical.DecodeFault as e:
        raise InputRejected(
            Reason.BAD_INPUT, f"{text!r}: {e.problem}", "name a version like fashion@1.2.0"
        ) from e


def identifier(text: str, option: str) -> str:
    """A device's or tenant's name: one level of a topic, no wildcard. Raises InputRejected."""
    from edge_contract import canonical
    from edge_contract.manifest import Identifier

    try:
        return canonical.from_builtins(text, Identifier)
    except canonical.DecodeFault as e:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{option} {text!r} is not a name of letters, digits, `.`, `_`, `-` (64 at most)",
            "give the name as the device's configuration has it",
        ) from e


def _address(
    broker: str, ca: Path | None, cert: Path | None, key: Path | None, username: str, password: Path | None
) -> Address:
    from fleet.bus import Address

    host, colon, port = broker.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputRejected(
            Reason.BAD_INPUT, f"--broker {broker!r} is not HOST:PORT", "write it like 192.168.1.2:1883"
        )
    if (cert is not None or key is not None) and ca is None:
        raise InputRejected(
            Reason.BAD_INPUT, "--tls-cert and --tls-key need --tls-ca", "name the broker's CA with --tls-ca"
        )
    return Address(
        host=host.strip("[]"),
        port=int(port),
        tls_ca=str(ca or ""),
        tls_cert=str(cert or ""),
        tls_key=str(key or ""),
        username=username,
        password="" if password is None else _broker_password(password),
    )


def _broker_password(path: Path) -> str:
    from fleet.registry.password import first_line

    try:
        return first_line(path).decode()
    except UnicodeDecodeError as e:
        raise InputRejected(
            Reason.BAD_INPUT, f"{path}: the broker's password is not UTF-8", "write the file as UTF-8"
        ) from e
