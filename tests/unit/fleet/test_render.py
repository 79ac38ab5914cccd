"""Tables and lines for people; live on a terminal, plain elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edge_contract import wire
from edge_contract.errors import Reason
from fleet import render
from tests.support.broker import Mosquitto
from tests.unit.fleet import samples
from tests.unit.fleet.device_double import Device

IDLE = wire.ModelState("fashion", "idle", version="1", digest="1" * 64)


def state(*models: wire.ModelState) -> wire.State:
    return wire.State(1, 1, True, list(models), [], 0)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_sizes(count: int, expected: str) -> None:
    assert render.size(count) == expected


@pytest.mark.parametrize(
    ("span_ms", "expected"),
    [
        (-5, "0 s ago"),
        (59_999, "59 s ago"),
        (60_000, "1 min ago"),
        (7_200_000, "2 h ago"),
        (10**9, "11 d ago"),
    ],
)
def test_spans(span_ms: int, expected: str) -> None:
    assert render.ago(span_ms) == expected


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([], "none"),
        ([IDLE], "fashion@1"),
        ([replace(IDLE, state="probation", target_version="2")], "fashion@1 (probation 2)"),
        (
            [replace(IDLE, outcome="failed", target_version="2", reason=Reason.TOO_SLOW)],
            "fashion@1 (2 failed: too_slow)",
        ),
        (
            [wire.ModelState("digits", "downloading", target_version="7"), IDLE],
            "digits@– (downloading 7), fashion@1",
        ),
    ],
)
def test_models(models: Any, expected: str) -> None:
    assert render.models(state(*models)) == expected
    assert render.models(None) == "?"


def test_metrics() -> None:
    made = samples.manifest({"model.onnx": b"m", "golden.npz": b"g"})
    assert render.metrics(made) == "top1 0.91 (test, fp32 0.92)"


def test_foreign_text_has_no_control_characters() -> None:
    assert render.clean("a\x1b[31m\r\nb\x00\u2028é") == "a [31m  b  é"


def test_a_terminal_gets_one_table_that_is_drawn_anew(
    published: Path, mosquitto: Mosquitto, tenant: str, operators: wire.Operators, run: Callable[..., object]
) -> None:
    where = ["--registry", str(published), "--broker", mosquitto.address, "--tenant", tenant]
    program = [sys.executable, "-c", "from fleet.cli import main; main()"]
    parent, child = pty.openpty()
    with Device(mosquitto.address, tenant, "a", operators):
        done = subprocess.Popen(
            [*program, "deploy", "fashion@2.0.0", "--device", "a", *where],
            stdout=child,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        )
        os.close(child)
        shown = _everything(parent)
        assert done.wait(20) == 0
    os.close(parent)
    last = shown.rpartition("Device")[2]
    assert shown.count("Device") > 1
    assert "committed" in last
    assert "\x1b[" in shown


def _everything(terminal: int) -> str:
    """All that is written until the other end closes."""
    data = b""
    while True:
        try:
            more = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says that the other end of a terminal is closed
            return data.decode()
        if not more:
            return data.decode()
        data += more


def test_a_list_of_words_is_one_line() -> None:
    data = {"facts": {"isa": ["fma", "avx2"], "cores": 4}, "runs": [{"ms": 1.5}, {"ms": 2.5}]}
    text = render.result("a", wire.Result(1, "x", True, Reason.OK, "done", "", 0, data))
    assert '"isa": "fma, avx2"' in text
    assert text.count("ms") == 2
    assert len(text.splitlines()) == 15
