"""Where a key's password comes from: a file, the environment, or the person at the terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from edge_contract.errors import InputRejected, Reason

VARIABLE = "EDGEWARD_KEY_PASSWORD"
PIN_VARIABLE = "EDGEWARD_KEY_PIN"


class Password:
    """Asks at most once. The order is file, environment, prompt."""

    def __init__(self, file: Path | None, *, insecure_none: bool = False) -> None:
        self._file = file
        self._none = insecure_none
        self._known: bytes | None = None

    def existing(self) -> bytes:
        """The password of keys that exist. Raises InputRejected when there is nobody to ask."""
        if self._known is None:
            given = self._given()
            self._known = _ask("Password of the keys", confirm=False) if given is None else given
        return self._known

    def new(self) -> bytes:
        """The password for new keys, typed twice; empty only where that was asked for in so many words."""
        if self._none:
            return b""
        given = self._given()
        password = _ask("New password for the keys", confirm=True) if given is None else given
        if not password:
            raise InputRejected(
                Reason.BAD_INPUT,
                "the password for the keys is empty",
                "choose one, or say --insecure-no-password for a trial that protects nothing",
            )
        return password

    def again(self) -> bytes:
        """The password for keys that join others: theirs if it was needed already, else a new one."""
        return self._known if self._known and not self._none else self.new()

    def _given(self) -> bytes | None:
        if self._file is not None:
            return first_line(self._file)
        value = os.environ.get(VARIABLE)
        return None if value is None else value.encode()


def pin(name: str) -> str:
    """The PIN of a security module, from the environment or typed. Raises InputRejected."""
    value = os.environ.get(PIN_VARIABLE)
    if value is not None:
        return value
    if not sys.stdin.isatty():
        raise InputRejected(
            Reason.BAD_INPUT,
            f"a key asks for its {name} and there is no terminal to ask for it",
            f"set {PIN_VARIABLE}",
        )
    typed: str = click.prompt(f"{name} of the key", hide_input=True, default="", err=True)
    return typed


def first_line(path: Path) -> bytes:
    """The first line of a password file. Raises InputRejected."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{path}: the password file cannot be read ({e.strerror})",
            "name a readable file whose first line is the password",
        ) from e
    return data.split(b"\n", 1)[0].removesuffix(b"\r")


def _ask(prompt: str, *, confirm: bool) -> bytes:
    if not sys.stdin.isatty():
        raise InputRejected(
            Reason.BAD_INPUT,
            "the keys need a password and there is no terminal to ask for it",
            f"set {VARIABLE} or give --key-password-file FILE",
        )
    text: str = click.prompt(prompt, hide_input=True, confirmation_prompt=confirm, default="", err=True)
    return text.encode()
