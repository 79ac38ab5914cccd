"""The command line: help is quick because it loads nothing, and says what there is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import click
import pytest
from click.testing import Result

from fleet.cli import main

HEAVY = (
    "tuf",
    "paho",
    "rich",
    "uvicorn",
    "starlette",
    "cryptography",
    "sqlite3",
    "securesystemslib",
    "iotcore",
)


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", [(), *commands()], ids=" ".join)
def test_every_command_explains_itself(run: Callable[..., Result], path: tuple[str, ...]) -> None:
    text = run(*path, "--help").stdout
    assert "Usage: edge-fleet" in text
    # No summary is cut off; the usage line may have an ellipsis of its own.
    assert not any(line.endswith("...") for line in text.splitlines()[1:])


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fleet.cli import main\n"
        "try: main(['registry', 'publish', '--help'])\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_unknown_commands_and_options_are_two(run: Callable[..., Result]) -> None:
    run("dance", code=2)
    run("devices", "--colour", code=2)
    run("deploy", code=2)
    run("broker", "--port", "70000", code=2)


def test_options_from_the_environment(
    run: Callable[..., Result], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEWARD_BROKER", "127.0.0.1:9")
    line = refused("devices", code=5, reason="broker_unreachable")
    assert "127.0.0.1:9" in line
    monkeypatch.setenv("EDGEWARD_TENANT", "not/one")
    refused("devices", code=2, reason="bad_input")
