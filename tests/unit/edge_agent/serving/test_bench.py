"""The benchmark: what it reports, what it makes of models that crash, hang or do not load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.serving import bench
from edge_contract import canonical
from edge_contract.bench import BenchReport, Failed, Measured
from edge_contract.canonical import sha256_hex
from edge_contract.errors import InputRejected, Reason
from tests.support.models import Fault, install, make_bundle, npz, samples, tiny_net
from tests.support.serving import wait_until


def net(folder: Path, name: str, fault: Fault = "none") -> Path:
    path = folder / f"{name}.onnx"
    path.write_bytes(tiny_net(fault=fault))
    return path


def run(
    *models: Path, rounds: int = 2, round_s: float = 0.01, inputs: Path | None = None, timeout_s: float = 60
) -> BenchReport:
    return bench.run(
        list(models), threads=1, rounds=rounds, round_s=round_s, inputs=inputs, timeout_s=timeout_s
    )


def measured(report: BenchReport, index: int = 0) -> Measured:
    result = report.results[index]
    assert isinstance(result, Measured), result
    return result


def failed(report: BenchReport, index: int) -> Failed:
    result = report.results[index]
    assert isinstance(result, Failed), result
    return result


def test_two_models_side_by_side(tmp_path: Path) -> None:
    fast, slow = net(tmp_path, "fast"), net(tmp_path, "slow", "slow")
    report = run(fast, slow, rounds=3)
    assert canonical.from_bytes(canonical.to_bytes(report), BenchReport) == report
    assert (report.threads, report.rounds) == (1, 3)
    assert report.reference_ms > 0.1
    first, second = measured(report), measured(report, 1)
    assert first.ratio == 1.0
    assert second.ratio > 20
    assert second.p50_ms > 20
    assert second.iterations >= 9
    for result, path in ((first, fast), (second, slow)):
        assert result.model == str(path)
        assert result.sha256 == sha256_hex(path.read_bytes())
        assert result.size_bytes == path.stat().st_size
        assert 0 < result.p50_ms <= result.p95_ms
        assert 0 < result.load_ms < 5000
        assert 20 << 20 < result.peak_rss_bytes < 400 << 20
        assert 0.3 * result.p50_ms < result.cpu_ms < 10 * result.p95_ms


def test_bundle_and_store_folders(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    layout = Layout(Config("acme", "box-1", state_dir=str(tmp_path)))
    report = run(bundle.folder, install(bundle, layout))
    assert measured(report).sha256 == measured(report, 1).sha256 == bundle.manifest.file("model").sha256


def test_what_does_not_load_or_run_is_a_result_and_the_rest_goes_on(tmp_path: Path) -> None:
    report = run(
        net(tmp_path, "garbage", "garbage"), net(tmp_path, "good"), net(tmp_path, "deadly", "crash_at_load")
    )
    garbage, good, deadly = failed(report, 0), measured(report, 1), failed(report, 2)
    assert garbage.reason is Reason.LOAD_FAILED
    assert "garbage.onnx does not load" in garbage.what
    assert deadly.reason is Reason.CANDIDATE_CRASHED
    assert "SIGFPE" in deadly.what
    assert good.ratio == 1.0  # the first that could be measured


def workers() -> list[psutil.Process]:
    """The benchmark's own children; other tests' brokers may be this process's children too."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "edge_agent.serving.bench_worker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_model_that_hangs_is_given_up(tmp_path: Path) -> None:
    report = run(net(tmp_path, "good"), net(tmp_path, "hang", "hang"), timeout_s=3)
    assert measured(report).iterations
    assert failed(report, 1).reason is Reason.CANDIDATE_HUNG
    assert not workers()


def test_a_process_that_is_killed_half_way(tmp_path: Path) -> None:
    """As the kernel does when memory runs out."""
    reports: list[BenchReport] = []
    doomed, good = net(tmp_path, "doomed"), net(tmp_path, "good")
    thread = threading.Thread(target=lambda: reports.append(run(good, doomed, rounds=40, round_s=0.05)))
    thread.start()
    wait_until(lambda: len(workers()) == 2, "both processes run")
    victim = max(workers(), key=lambda p: p.pid)
    wait_until(lambda: victim.cpu_times().user > 0.4, "it is at work")
    victim.kill()
    thread.join()
    assert failed(reports[0], 1).reason is Reason.CANDIDATE_CRASHED
    assert "SIGKILL" in failed(reports[0], 1).what
    assert measured(reports[0]).iterations


def test_inputs_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    path.write_bytes(npz({"x": samples(3), "label": np.zeros(3)}))
    assert measured(run(net(tmp_path, "good"), inputs=path)).iterations


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"image": samples(1)}, "has image; the model's input is x FP32"),
        ({"x": samples(1, features=9)}, "'x' is float32 [1, 9]"),
        ({"x": samples(1).astype(np.float64)}, "'x' is float64"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], named: str) -> None:
    path = tmp_path / "in.npz"
    path.write_bytes(npz(arrays))
    with pytest.raises(InputRejected) as refusal:
        run(net(tmp_path, "good"), inputs=path)
    assert named in refusal.value.what
    assert not workers()


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent.onnx", tmp_path / "model.pt", tmp_path / "empty"):
        with pytest.raises(InputRejected, match=path.name):
            run(path)
    with pytest.raises(InputRejected, match=r"absent\.npz: no such file"):
        run(net(tmp_path, "good"), inputs=tmp_path / "absent.npz")


def test_the_command_line(tmp_path: Path) -> None:
    good, garbage = net(tmp_path, "good"), net(tmp_path, "garbage", "garbage")
    command = [sys.executable, "-m", "edge_agent", "bench", str(good), str(garbage), "--rounds", "1"]
    command += ["--round-s", "0.01"]
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True)
    report = canonical.from_bytes(as_json.stdout.encode(), BenchReport)
    assert measured(report).model == str(good)
    plain = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    head, row, failure, machine = plain.stdout.splitlines()
    titles = ["model", "p50 ms", "p95 ms", "ratio", "load ms", "peak MB", "cpu ms", "size kB"]
    assert re.split(r"  +", head) == titles
    assert row.startswith(str(good))
    assert len(row) == len(head)
    assert failure.startswith(f"{garbage}: failed: ")
    assert "1 thread(s), 1 rounds" in machine
    missing = subprocess.run(
        [*command[:4], str(tmp_path / "absent.onnx"), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert missing.returncode == 2
    assert json.loads(missing.stdout)["error"]["reason"] == "bad_input"
