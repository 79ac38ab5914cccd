"""The README's command blocks that can run, run: those marked `sh run`. The others' options exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"^```sh( run)?\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PROGRAMS = {"edge-optimize", "edge-agent", "edge-fleet"}


def _commands() -> list[list[str]]:
    """Every call of one of our programs in any block, as words."""
    found = []
    for _, block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and Path(words[0]).name in PROGRAMS:
                found.append([Path(words[0]).name, *words[1:]])
    return found


@pytest.mark.parametrize("block", [b for run, b in BLOCKS if run], ids=lambda b: b.split("\n")[0][:40])
def test_marked_blocks_run(block: str, tmp_path: Path) -> None:
    # In a copy of what they name, so that a second run starts clean.
    for name in ("examples", "device_profiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "build/fashion-1/report.html").stat().st_size > 10_000
    assert (tmp_path / "build/fashion-1/bundle/manifest.json").exists()


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_named_options_exist(words: list[str]) -> None:
    """`PROGRAM … --help` knows every option that the README uses with it."""
    path = [words[0]]
    for word in words[1:]:
        done = subprocess.run([BIN / path[0], *path[1:], word, "--help"], capture_output=True, text=True)
        if word.startswith("-") or done.returncode != 0 or f"{word}" not in done.stdout.split("\n")[0]:
            break
        path.append(word)
    help_text = subprocess.run([BIN / path[0], *path[1:], "--help"], capture_output=True, text=True).stdout
    for option in (w.partition("=")[0] for w in words if w.startswith("--")):
        assert option in help_text, f"{' '.join(path)} has no {option}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", TEXT))
    assert named, "the README names no make target"
    assert named <= targets
