"""`edge-agent status`: what disk and inference process say, also when some of it is damaged or away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import files, status
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.update import journal
from edge_agent.update.journal import Entry, Ref
from edge_agent.update.machine import State
from edge_contract import canonical, wire
from edge_contract.errors import Reason
from tests.support.control_double import InferenceDouble
from tests.support.models import BundleOnDisk, install, make_bundle


@pytest.fixture
def config() -> Iterator[Config]:
    with tempfile.TemporaryDirectory(prefix="ew-") as folder:
        yield Config(tenant="acme", device="box", state_dir=f"{folder}/state", run_dir=f"{folder}/run")


@pytest.fixture
def layout(config: Config) -> Layout:
    return Layout(config)


@pytest.fixture
def bundles(layout: Layout, tmp_path: Path) -> list[BundleOnDisk]:
    """1.0.0 served before, 2.0.0 is current, 3.0.0 was thrown out."""
    made = [make_bundle(tmp_path, version=f"{n}.0.0", release=n, seed=n) for n in (1, 2, 3)]
    install(made[0], layout, "previous")
    install(made[1], layout, "current")
    files.make_folder(layout.journal)
    journal.save(
        layout,
        Entry(
            schema=1,
            name="tiny",
            generation=4,
            settled_generation=4,
            target=Ref("3.0.0", made[2].digest),
            base=Ref("2.0.0", made[1].digest),
            attempts=1,
            outcome="reverted",
            reason=Reason.OUTPUT_DRIFT,
            detail="decisions moved",
        ),
    )
    desired = wire.Desired(1, "acme", "box", 4, 0, 1, [wire.DesiredModel("tiny", "3.0.0", made[2].digest)])
    files.write(layout.desired, canonical.to_bytes(desired))
    return made


def test_a_device_that_has_not_lived_yet(config: Config) -> None:
    found = status.collect(config)
    assert {k: found[k] for k in ("device", "tenant", "control", "serving", "generation", "models")} == {
        "device": "box",
        "tenant": "acme",
        "control": False,
        "serving": False,
        "generation": 0,
        "models": [],
    }
    assert status.text(found).splitlines() == [
        "acme/box: control down, inference down, generation 0",
        "  nothing runs here: start edge-inference.service and edge-agent.service, "
        "or `edge-agent up` where there is no systemd",
    ]
    running = status.text({**found, "control": True}).splitlines()
    assert running[1:] == ["  no models: deploy one with `edge-fleet deploy`"]
    assert not Path(config.state_dir).exists()  # looking changes nothing


def test_disk_and_process_are_told_apart(config: Config, layout: Layout, bundles: list[BundleOnDisk]) -> None:
    with InferenceDouble(layout, loaded={"tiny": bundles[0].digest}):
        lock = files.try_lock(layout.control_lock)
        found = status.collect(config)
    assert lock is not None
    assert (found["control"], found["serving"], found["generation"]) == (True, True, 4)
    assert found["models"] == [
        {
            "name": "tiny",
            "serves": {"version": "1.0.0", "digest": bundles[0].digest},
            "not_loaded": "",
            "current": "2.0.0",
            "previous": "1.0.0",
            "state": "idle",
            "target": "3.0.0",
            "outcome": "reverted",
            "reason": "output_drift",
            "detail": "decisions moved",
            "attempts": 1,
            "interruptions": 0,
            "base": {"version": "2.0.0", "digest": bundles[1].digest},
        }
    ]
    assert status.text(found).splitlines()[1:] == [
        "  tiny: serves 1.0.0, disk says 2.0.0, idle",
        "    last attempt: 3.0.0 reverted [output_drift] decisions moved",
    ]


def test_without_processes_the_disk_still_speaks(config: Config, bundles: list[BundleOnDisk]) -> None:
    found = status.collect(config)
    assert (found["control"], found["serving"]) == (False, False)
    assert (found["models"][0]["serves"], found["models"][0]["current"]) == (None, "2.0.0")
    assert "serves nothing, disk says 2.0.0" in status.text(found)


@pytest.mark.parametrize("damage", ["journal", "manifest cut", "manifest gone", "desired"])
def test_damage_is_told_and_stops_nothing(
    config: Config, layout: Layout, bundles: list[BundleOnDisk], damage: str
) -> None:
    manifest = layout.current("tiny") / "manifest.json"
    match damage:
        case "journal":
            layout.journal_file("tiny").write_bytes(b"\0" * 50)
        case "manifest cut":
            manifest.write_bytes(manifest.read_bytes()[:50])
        case "manifest gone":
            manifest.unlink()
        case "desired":
            layout.desired.write_bytes(b"")
    (model,) = status.collect(config)["models"]
    told = {
        "journal": "its journal is damaged" in model["detail"],
        "manifest cut": model["current"] == f"damaged {bundles[1].digest[:12]}",
        "manifest gone": model["current"] == f"missing {bundles[1].digest[:12]}",
        "desired": status.collect(config)["generation"] == 0,
    }
    assert told[damage]
    assert model["previous"] == "1.0.0"


@pytest.mark.parametrize("state", State)
def test_an_update_under_way_is_told(
    config: Config, layout: Layout, bundles: list[BundleOnDisk], state: State
) -> None:
    entry, _ = journal.load(layout, "tiny", 0)
    journal.save(layout, Entry(schema=1, name="tiny", state=state, target=entry.target))
    (model,) = status.collect(config)["models"]
    assert (model["state"], model["target"], model["outcome"]) == (state.value, "3.0.0", "none")


def test_what_is_not_loaded_is_said_with_its_reason(config: Config, bundles: list[BundleOnDisk]) -> None:
    with InferenceDouble(Layout(config)) as double:
        entry = {"name": "tiny", "version": "", "state": "UNAVAILABLE", "digest": bundles[1].digest}
        entry |= {"reason": "failed_starts", "detail": "the process did not survive 3 starts with it"}
        double.instead["/v2/repository/index"] = (200, canonical.to_bytes([entry]))
        found = status.collect(config)
    assert found["models"][0]["serves"] is None
    said = "nothing (the process did not survive 3 starts with it [failed_starts])"
    assert f"tiny: serves {said}, disk says 2.0.0, idle" in status.text(found)
