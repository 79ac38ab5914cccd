"""How a program ends: exit code, one line, JSON; and the completion scripts, run by a real shell."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click
import pytest

from edge_contract import console, errors
from edge_contract.errors import EdgewardError, Reason

# A program on its own, for the tests that need a process.
PROGRAM = """
import click
from edge_contract.console import Program

@click.group("edge-test", cls=Program)
def main():
    "A program."

@main.command()
@click.option("--depth", type=click.Choice(["shallow", "deep"]))
def dive(depth):
    "Go down."

@main.command()
def talk():
    "Print without end."
    while True:
        click.echo("line " * 1000)

if __name__ == "__main__":
    main()
"""


def run(action: Callable[[], object], *args: str) -> int:
    """The exit code of a program whose one command, `work`, does `action`."""

    @click.group("edge-test", cls=console.Program)
    def main() -> None:
        """A program."""

    @main.command()
    @console.json_option
    def work(as_json: bool) -> object:
        return action()

    with pytest.raises(SystemExit) as caught:
        main.main(["work", *args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def action() -> NoReturn:
        raise error

    return action


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "edge-test"
    path.write_text(f"#!{sys.executable}\n{PROGRAM}")
    path.chmod(0o755)
    return path


def shell(program: Path, script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=30, check=False
    )


def test_success_is_zero_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "kind", [kind for kind in EdgewardError.__subclasses__() if kind.__module__ == errors.__name__]
)
def test_expected_failures_end_in_one_line_and_their_code(
    kind: type[EdgewardError], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (Reason.BAD_INPUT, "this is wrong", "do that")
    error = errors.RequestRejected(400, *arguments) if kind is errors.RequestRejected else kind(*arguments)
    assert run(raising(error)) == kind.exit_code
    assert capsys.readouterr() == ("", "edge-test: this is wrong [bad_input] → do that\n")


def test_with_json_the_failure_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.BundleRejected(Reason.DIGEST_MISMATCH, "blob is wrong", "publish again")
    assert run(raising(error), "--json") == 4
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "ok": False,
        "error": {"reason": "digest_mismatch", "what": "blob is wrong", "next_step": "publish again"},
    }


def test_a_full_disk_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x"))) == 7
    assert (
        capsys.readouterr().err
        == "edge-test: /data/x: no space left [disk_full] → free space and run it again\n"
    )


def test_any_other_os_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nothing"
    assert run(missing.read_bytes) == 7
    err = capsys.readouterr().err
    assert err.startswith(f"edge-test: {missing}: No such file or directory [storage_fault] → ")
    assert err.count("\n") == 1


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(KeyboardInterrupt())) == 130
    assert "edge-test: interrupted" in capsys.readouterr().err


def test_a_programmers_mistake_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="bug"):
        run_raising(RuntimeError("bug"))


def run_raising(error: Exception) -> None:
    @click.command("edge-test")
    def mistake() -> None:
        raise error

    group = console.Program("edge-test")
    group.add_command(mistake, "work")
    group.main(["work"])


def test_a_missing_package_is_one_line_and_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    @click.group("edge-test", cls=console.Program, brought_by="edgeward[some]")
    def main() -> None:
        """A program."""

    @main.command()
    def work() -> None:
        raise ModuleNotFoundError("No module named 'absent'", name="absent.part")

    with pytest.raises(SystemExit) as caught:
        main.main(["work"])
    assert caught.value.code == 6
    assert capsys.readouterr().err == (
        "edge-test: this command needs the Python package absent, which is not installed [runtime_missing]"
        " → install edgeward[some]\n"
    )


def test_a_missing_module_of_ours_is_a_programmers_mistake() -> None:
    with pytest.raises(ModuleNotFoundError):
        run_raising(ModuleNotFoundError("No module named 'fleet.nothing'", name="fleet.nothing"))


def test_usage_errors_are_two_and_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: None, "--colour") == 2
    assert "No such option '--colour'" in capsys.readouterr().err.replace(":", "")


def test_a_command_may_choose_its_exit_code() -> None:
    assert run(raising(SystemExit(4))) == 4
    assert run(lambda: 3) == 3


def test_help_and_version(program: Path) -> None:
    helped = shell(program, "edge-test -h")
    assert helped.returncode == 0
    assert "Exit codes:" in helped.stdout
    assert "dive" in helped.stdout
    version = shell(program, "edge-test --version")
    assert version.stdout == f"edge-test, version {console.distribution_version()}\n"


def test_a_closed_pipe_is_silent(program: Path) -> None:
    done = shell(program, "edge-test talk | head -c 10")
    assert done.stderr == ""


def test_bash_completion_completes(program: Path) -> None:
    script = """
        eval "$(edge-test completion bash)"
        COMP_WORDS=(edge-test dive --depth '') COMP_CWORD=3
        _edge_test_completion edge-test
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = shell(program, script)
    assert done.stderr == ""
    assert done.stdout.split() == ["shallow", "deep"]


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_every_shell_gets_a_script_that_calls_the_program(program: Path, kind: str) -> None:
    done = shell(program, f"edge-test completion {kind}")
    assert done.returncode == 0
    assert f"_EDGE_TEST_COMPLETE={kind}_complete" in done.stdout


def test_the_bash_script_has_no_syntax_error(program: Path) -> None:
    done = shell(program, "edge-test completion bash | bash -n")
    assert (done.returncode, done.stderr) == (0, "")


def test_no_other_shell(program: Path) -> None:
    assert shell(program, "edge-test completion tcsh").returncode == 2


def test_json_keeps_the_order_of_keys(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"b": 1, "a": [2]})
    assert list(json.loads(capsys.readouterr().out)) == ["b", "a"]
