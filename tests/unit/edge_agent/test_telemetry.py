"""Windows of telemetry: the device's sensors, and differences of what each version served."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.config import Config
from edge_agent.inference import InferenceClient
from edge_agent.layout import Layout
from edge_agent.sensors import METRICS, Sensors
from edge_agent.telemetry import Sampler
from edge_contract import canonical, wire
from tests.support.control_double import InferenceDouble
from tests.support.models import BundleOnDisk, install, make_bundle


@pytest.fixture
def layout() -> Iterator[Layout]:
    with tempfile.TemporaryDirectory(prefix="ew-") as folder:
        yield Layout(Config(tenant="t", device="d", state_dir=f"{folder}/state", run_dir=f"{folder}/run"))


@pytest.fixture
def bundle(layout: Layout, tmp_path: Path) -> BundleOnDisk:
    bundle = make_bundle(tmp_path)
    install(bundle, layout)
    return bundle


@pytest.fixture
def double(layout: Layout, bundle: BundleOnDisk) -> Iterator[InferenceDouble]:
    with InferenceDouble(layout) as double:
        double.loaded["tiny"] = bundle.digest
        yield double


@pytest.fixture
def sampler(layout: Layout) -> Sampler:
    return Sampler(Sensors(layout.state), InferenceClient(layout.control_socket), 0)


def test_sensors_have_a_value_for_every_metric(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path)
    first, second = sensors.sample(1_700_000_000_000), sensors.sample(1_700_000_001_000)
    assert tuple(first) == tuple(second) == METRICS
    assert first["net_sent_bytes_per_s"] is None  # a rate needs two looks
    for name in set(METRICS) - {"temperature_c"}:
        value = second[name]
        assert value is not None, name
        if name != "uptime_s":
            assert value >= 0, name
    assert 0 < (second["memory_percent"] or 0) < 100
    assert 0 < (second["disk_percent"] or 0) <= 100


def test_a_disk_that_does_not_answer_leaves_out_its_own_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> None:
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr("psutil.disk_usage", broken)
    sample = Sensors(tmp_path).sample(1_700_000_000_000)
    assert sample["disk_percent"] is None
    assert sample["disk_free_bytes"] is None
    assert sample["memory_percent"]


def test_a_window_holds_what_was_served_in_it(
    sampler: Sampler, double: InferenceDouble, bundle: BundleOnDisk
) -> None:
    double.count(bundle.digest, 30, errors=3)
    (model,) = sampler.sample(10_000, serving=True).models
    assert (model.name, model.version, model.requests, model.errors) == ("tiny", "1.0.0", 30, 3)
    assert model.rate_per_s == 3.0
    assert model.p50_ms is not None
    double.count(bundle.digest, 50, errors=3)
    window = sampler.sample(15_000, serving=True)
    (model,) = window.models
    assert (window.window_s, model.requests, model.errors, model.rate_per_s) == (5.0, 20, 0, 4.0)
    (model,) = sampler.sample(20_000, serving=True).models
    assert (model.requests, model.p50_ms, model.p99_ms) == (0, None, None)
    assert wire.decode(canonical.to_bytes(window), wire.Telemetry) == window


def test_a_silence_is_made_up_for_and_never_counted_twice(
    sampler: Sampler, double: InferenceDouble, bundle: BundleOnDisk
) -> None:
    double.count(bundle.digest, 30)
    sampler.sample(1_000, serving=True)
    double.count(bundle.digest, 40)
    double.instead["/edgeward/v1/stats"] = (503, b"")
    assert sampler.sample(2_000, serving=True).models == []
    double.instead.clear()
    assert sampler.sample(3_000, serving=False).models == []  # not even asked
    double.count(bundle.digest, 45)
    (model,) = sampler.sample(4_000, serving=True).models
    assert model.requests == 15


def test_another_process_counts_from_zero(
    sampler: Sampler, double: InferenceDouble, bundle: BundleOnDisk
) -> None:
    double.count(bundle.digest, 30)
    sampler.sample(1_000, serving=True)
    double.restart()
    double.count(bundle.digest, 7, loaded_ms=99)
    (model,) = sampler.sample(2_000, serving=True).models
    assert model.requests == 7


def test_a_clock_that_stands_still_or_goes_back_makes_no_nonsense(
    sampler: Sampler, double: InferenceDouble
) -> None:
    for now_ms in (0, 0, -5_000):
        window = sampler.sample(now_ms, serving=True)
        assert window.window_s > 0
        assert all(m.rate_per_s >= 0 for m in window.models)
