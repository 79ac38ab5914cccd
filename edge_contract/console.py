"""How the three programs meet people and shells: one-line errors, exit codes, completion, JSON.

The one module here that prints. It knows no command; each program's cli.py brings those.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

from edge_contract.errors import DeviceUnfit, EdgewardError, Reason, StorageFault

EXIT_CODES = """\b
Exit codes:
  0  done
  1  a request was refused by the other end
  2  the input cannot be used
  3  the work was done and the outcome is no
  4  the bundle is at fault, never retry it
  5  network or the other end, retry later
  6  this device cannot do it
  7  disk or filesystem
  8  a message was refused
  130  interrupted"""


_OURS = frozenset({"edge_contract", "edge_agent", "optimizer", "fleet"})


def _missing(package: str, brought_by: str) -> DeviceUnfit:
    return DeviceUnfit(
        Reason.RUNTIME_MISSING,
        f"this command needs the Python package {package}, which is not installed",
        f"install {brought_by}",
    )


def distribution_version() -> str:
    """Version of the installed distribution."""
    return metadata.version("edgeward")


class Program(click.Group):
    """A click group whose expected failures end in one line and a meaningful exit code.

    With `--json` among the arguments, the line is a JSON object on standard output instead.
    `brought_by` names the extra that installs what its commands import.
    """

    def __init__(self, *args: Any, brought_by: str = "edgeward", **kwargs: Any) -> None:
        kwargs.setdefault("epilog", EXIT_CODES)
        kwargs.setdefault(
            "context_settings", {"help_option_names": ["-h", "--help"], "max_content_width": 110}
        )
        super().__init__(*args, **kwargs)
        self._brought_by = brought_by
        click.version_option(distribution_version(), prog_name=self.name)(self)
        self.add_command(_completion_command(self))

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run; never lets an expected failure out as a traceback."""
        given = list(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        extra.setdefault("prog_name", self.name)
        try:
            code = super().main(given, standalone_mode=False, **extra)
        except click.ClickException as e:
            e.show()
            sys.exit(e.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo(f"{self.name}: interrupted", err=True)
            sys.exit(130)
        except EdgewardError as e:
            self._fail(e, as_json="--json" in given)
        except OSError as e:
            self._fail(os_fault(e), as_json="--json" in given)
        except ModuleNotFoundError as e:
            package = (e.name or "").partition(".")[0]
            if package in _OURS:
                raise  # a mistake of ours, not of the installation
            self._fail(_missing(package, self._brought_by), as_json="--json" in given)
        sys.exit(code if isinstance(code, int) else 0)

    def _fail(self, error: EdgewardError, *, as_json: bool) -> NoReturn:
        if as_json:
            click.echo(json.dumps({"ok": False, "error": error_dict(error)}))
        else:
            click.echo(f"{self.name}: {error}", err=True)
        sys.exit(error.exit_code)


def error_dict(error: EdgewardError) -> dict[str, str]:
    """What programs read of an error."""
    return {"reason": error.reason.value, "what": error.what, "next_step": error.next_step}


def os_fault(error: OSError) -> StorageFault:
    """An operating system's error as a StorageFault that names the file."""
    subject = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFault(Reason.DISK_FULL, f"{subject}no space left", "free space and run it again")
    return StorageFault(
        Reason.STORAGE_FAULT,
        f"{subject}{error.strerror or error}",
        "check that the path exists, that its permissions allow this, and that the disk is healthy",
    )


def print_json(value: Any) -> None:
    """Indented JSON on standard output, keys in the order given."""
    click.echo(json.dumps(value, indent=2))


def _completion_command(program: Program) -> click.Command:
    @click.command("completion", short_help="Print a shell completion script.")
    @click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
    def completion(shell: str) -> None:
        """Print the completion script for SHELL; for bash: `eval "$(PROGRAM completion bash)"`."""
        name = program.name or ""
        kind = get_completion_class(shell)
        if kind is None:
            raise RuntimeError(shell)
        click.echo(kind(program, {}, name, _variable(name)).source())

    return completion


def _variable(name: str) -> str:
    return f"_{name.replace('-', '_').upper()}_COMPLETE"


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The `--json` flag every reporting command has."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)
