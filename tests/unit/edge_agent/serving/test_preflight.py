"""Verdicts on candidates: each names its numbers."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.config import Config
from edge_agent.layout import MANIFEST, Layout
from edge_agent.serving import preflight, rusage
from edge_contract.canonical import sha256_hex
from edge_contract.errors import DeviceUnfit, InputRejected, Reason
from edge_contract.manifest import Expected, to_bytes
from tests.support.models import Fault, install, make_bundle, samples, scores, write_bundle


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(Config("acme", "box-1", state_dir=str(tmp_path / "state")))


def verdict(tmp_path: Path, layout: Layout, fault: Fault = "none", **options: float) -> preflight.Verdict:
    return preflight.run(install(make_bundle(tmp_path, fault=fault, **options), layout))  # type: ignore[arg-type]


def test_a_good_version_passes_with_its_figures(tmp_path: Path, layout: Layout) -> None:
    found = verdict(tmp_path, layout)
    assert (found.ok, found.reason, found.next_step) == (True, Reason.OK, "")
    assert "tiny@1.0.0 agrees with 8 golden samples" in found.what
    assert 0 < found.p50_ms <= found.p95_ms
    assert found.load_ms > 0
    assert found.peak_rss_bytes > 20 << 20
    assert found.reference_ms > 0.1
    assert json.loads(json.dumps(preflight.verdict_dict(found)))["reason"] == "ok"


def test_a_bundle_folder_is_examined_as_well(tmp_path: Path) -> None:
    assert preflight.run(make_bundle(tmp_path).folder).ok


@pytest.mark.parametrize(
    ("fault", "reason", "named"),
    [
        ("wrong_weights", Reason.GOLDEN_MISMATCH, "output 'scores': "),
        ("non_finite", Reason.NON_FINITE_OUTPUT, "4 of 4 values"),
        ("garbage", Reason.LOAD_FAILED, "model.onnx does not load"),
        ("interface", Reason.MANIFEST_INVALID, "golden output:scores"),
    ],
)
def test_faulty_versions(tmp_path: Path, layout: Layout, fault: Fault, reason: Reason, named: str) -> None:
    found = verdict(tmp_path, layout, fault)
    assert (found.ok, found.reason) == (False, reason)
    assert named in found.what
    assert found.next_step
    assert preflight.sentence(found).startswith("rejected: ")


def test_a_golden_mismatch_names_distance_and_tolerance(tmp_path: Path, layout: Layout) -> None:
    said = verdict(tmp_path, layout, "wrong_weights").what
    assert "tiny@1.0.0" in said
    assert "of 32 golden values differ" in said
    assert "tolerance 0.0001 + 0.001 of the value" in said


def test_a_slow_version(tmp_path: Path, layout: Layout) -> None:
    found = verdict(tmp_path, layout, "slow", expected_p50_ms=0.01)
    assert (found.ok, found.reason) == (False, Reason.TOO_SLOW)
    assert f"p50 {found.p50_ms:.3f} ms" in found.what
    assert "5 times the expected 0.010 ms" in found.what


def test_a_patient_factor_lets_it_pass(tmp_path: Path, layout: Layout) -> None:
    folder = install(make_bundle(tmp_path, fault="slow", expected_p50_ms=50.0, reference_ms=0.001), layout)
    assert preflight.run(folder, preflight.Terms(latency_factor=1.0)).ok


@pytest.mark.parametrize(
    ("expected_p50_ms", "reference_here_ms", "factor", "limit_ms"),
    [(4.0, 10.0, 5.0, 20.0), (4.0, 20.0, 5.0, 40.0), (4.0, 5.0, 2.0, 4.0), (0.01, 10.0, 5.0, 1.0)],
)
def test_the_limit_scales_with_the_machine_and_has_a_floor(
    expected_p50_ms: float, reference_here_ms: float, factor: float, limit_ms: float
) -> None:
    expected = Expected(expected_p50_ms, 9, 9, 9, reference_ms=10.0)
    assert preflight.latency_limit_ms(expected, reference_here_ms, factor) == pytest.approx(limit_ms)


class Sleeper:
    """A model whose runs take what is said, one after the other."""

    def __init__(self, *runs_ms: float) -> None:
        self._runs_ms = itertools.cycle(runs_ms)
        self.runs = 0

    def run(self, inputs: object) -> dict[str, object]:
        self.runs += 1
        time.sleep(next(self._runs_ms) / 1000)
        return {}


def test_a_busy_device_slows_some_rounds_and_a_slow_model_all() -> None:
    """The first twenty runs are disturbed; the next are not, and count."""
    disturbed = Sleeper(*[20.0] * 20, *[2.0] * 60)
    found = preflight.measure(disturbed, {}, lambda t: t.p50_ms < 10)  # type: ignore[arg-type]
    assert 2 <= found.p50_ms < 10
    slow = Sleeper(15.0)
    assert preflight.measure(slow, {}, lambda t: t.p50_ms < 10).p50_ms >= 15  # type: ignore[arg-type]
    assert slow.runs <= 80  # it has an end


def test_memory_over_the_expectation(tmp_path: Path, layout: Layout) -> None:
    folder = install(make_bundle(tmp_path), layout)
    assert preflight.run(folder, preflight.Terms(memory_factor=1.0)).ok  # within the floor
    expected = Expected(5.0, 9, 9, 200 << 20, 1.0)
    assert preflight.memory_limit_bytes(expected, 40 << 20, 2.0) == 400 << 20
    assert preflight.memory_limit_bytes(expected, 500 << 20, 2.0) == 564 << 20


@pytest.mark.parametrize("resets", [True, False])
def test_what_the_process_took_before_is_not_the_candidates(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch, resets: bool
) -> None:
    """Also where the kernel does not let the peak begin anew."""
    if not resets:
        monkeypatch.setattr(rusage, "forget_peak", lambda: False)
    folder = install(make_bundle(tmp_path), layout)
    assert len(b"x" * (256 << 20)) == 256 << 20  # gone at once; the peak stays
    assert preflight.run(folder, preflight.Terms(memory_factor=0.01)).ok


def test_a_candidate_beyond_its_memory_limit_is_a_verdict(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(make_bundle(tmp_path), layout)
    taken: list[bytes] = []
    real = preflight.open_package

    def greedy(*arguments: Any) -> Any:
        taken.append(b"x" * (128 << 20))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preflight, "open_package", greedy)
        found = preflight.run(folder, preflight.Terms(memory_factor=0.01))
    assert (found.ok, found.reason) == (False, Reason.MEMORY_EXCEEDED)
    assert "that its manifest expects" in found.what

    def bomb(*_: object) -> None:
        raise MemoryError("bad\nallocation")

    monkeypatch.setattr(preflight, "open_package", bomb)
    found = preflight.run(folder)
    assert (found.ok, found.reason) == (False, Reason.MEMORY_EXCEEDED)
    assert "bad allocation" in found.what


def test_without_free_memory_the_device_is_at_fault(tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(DeviceUnfit, match="does not fit beside what runs") as found:
        preflight.run(install(make_bundle(tmp_path), layout), preflight.Terms(free_bytes=1 << 60))
    assert found.value.reason is Reason.MEMORY_TOO_SMALL


def test_one_flipped_bit_in_any_file(tmp_path: Path, layout: Layout) -> None:
    folder = install(make_bundle(tmp_path, padding_bytes=100), layout)
    for name in ("model.onnx", "golden.npz", "padding.bin"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:50] + bytes([whole[50] ^ 4]) + whole[51:])
        found = preflight.run(folder)
        assert (found.ok, found.reason) == (False, Reason.DIGEST_MISMATCH)
        assert name in found.what
        (folder / name).write_bytes(whole)
    assert preflight.run(folder).ok


def test_a_model_that_fails_on_a_golden_sample(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, fault="error_above")
    x = samples(8)
    x[3, 0] = 5000
    again = write_bundle(
        tmp_path / "again",
        "tiny",
        "2",
        2,
        model=bundle.blob("model").read_bytes(),
        inputs=bundle.manifest.inputs,
        outputs=bundle.manifest.outputs,
        golden={"input:x": x, "output:scores": scores(x)},
    )
    found = preflight.run(again.folder)
    assert found.reason is Reason.INFERENCE_FAILED
    assert "a golden sample cannot be run" in found.what


def test_golden_vectors_are_not_unpickled(tmp_path: Path, layout: Layout) -> None:
    """Also when their digest is in order."""
    bundle = make_bundle(tmp_path)
    pickled = io.BytesIO()
    np.savez(pickled, **{"input:x": np.array([print], np.object_)})  # type: ignore[arg-type]
    folder = install(bundle, layout)
    (folder / "golden.npz").write_bytes(pickled.getvalue())
    file = bundle.manifest.file("golden")
    honest = msgspec.structs.replace(
        file, sha256=sha256_hex(pickled.getvalue()), size_bytes=len(pickled.getvalue())
    )
    files = [honest if f.role == "golden" else f for f in bundle.manifest.files]
    (folder / MANIFEST).write_bytes(to_bytes(msgspec.structs.replace(bundle.manifest, files=files)))
    found = preflight.run(folder)
    assert found.reason is Reason.MANIFEST_INVALID
    assert "golden vectors: golden.npz cannot be read as NPZ: Object arrays" in found.what


def test_a_folder_without_a_version(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"has no manifest\.json"):
        preflight.run(tmp_path)


def command(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", "preflight", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_line(tmp_path: Path, layout: Layout) -> None:
    good = command(install(make_bundle(tmp_path), layout), "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["ok"] is True
    bad = install(make_bundle(tmp_path, version="2", fault="wrong_weights"), layout)
    found = command(bad, "--json")
    assert found.returncode == 4
    assert json.loads(found.stdout)["reason"] == "golden_mismatch"
    plain = command(bad)
    assert plain.returncode == 4
    assert plain.stdout.count("\n") == 1
    assert "[golden_mismatch]" in plain.stdout
    deadly = install(make_bundle(tmp_path, version="3", fault="crash_at_load"), layout)
    assert command(deadly, "--json").returncode == -8
