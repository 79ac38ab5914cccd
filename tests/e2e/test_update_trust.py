"""Registries that were altered, have expired or vanish, and disks without room: the old version serves on."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_contract import wire
from edge_contract.errors import Reason
from tests.e2e.conftest import MakeSite, Site
from tests.support.broker import Mosquitto
from tests.support.device import TENANT, Device
from tests.support.http_registry import FolderServer, stall, whole
from tests.support.models import make_bundle, samples, scores
from tests.support.operator import Operator
from tests.support.tuf_repository import TufRepository

X = samples(4)


@pytest.fixture(scope="module")
def site(make_module_site: MakeSite) -> Site:
    """A device that serves four models of version 1.0.0, one for each of the tests that share it."""
    site = make_module_site()
    site.keep = True
    site.install(*(site.publish(name, 1) for name in ("one", "two", "three", "four")))
    return site


def assert_serves(site: Site, name: str, version: int) -> None:
    np.testing.assert_allclose(site.device.scores(name, X), scores(X, seed=version), rtol=1e-4)
    assert site.device.model(name)["serves"]["version"] == f"{version}.0.0"


def assert_nothing_half_written(site: Site) -> None:
    """Whole versions and nothing else in the store; no folder under construction."""
    for folder in site.device.layout.store.iterdir():
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for file in manifest["files"]:
            assert (folder / file["name"]).stat().st_size == file["size_bytes"]
    assert [p.name for p in site.device.layout.staging.iterdir() if p.is_dir()] == []


def test_a_blob_that_was_altered_is_refused_and_its_bundle_is_not_blamed(site: Site) -> None:
    v2 = site.publish("one", 2)
    blob = site.registry.blob(v2)
    data = blob.read_bytes()
    altered = data[:-1] + bytes([data[-1] ^ 1])
    site.server.instead[str(blob.relative_to(site.registry.folder))] = whole(altered)
    (model,) = site.deploy(v2)
    assert (model.outcome, model.reason, model.version) == ("failed", Reason.DIGEST_MISMATCH, "1.0.0")
    assert blob.name[:12] in model.detail
    assert_serves(site, "one", 1)
    assert_nothing_half_written(site)
    assert v2.digest not in site.state.rejected
    site.server.instead.clear()
    (model,) = site.deploy(v2)
    assert model.outcome == "committed"
    assert_serves(site, "one", 2)


def test_metadata_that_was_altered_is_refused_until_it_is_right_again(site: Site) -> None:
    v2 = site.publish("two", 2)
    path = "metadata/timestamp.json"
    document = json.loads((site.registry.folder / path).read_text())
    document["signed"]["version"] += 1000
    site.server.instead[path] = whole(json.dumps(document).encode())
    site.desire(v2)
    model = site.wait_state("two", "waiting")
    assert (model.reason, model.version) == (Reason.TRUST_FAILED, "1.0.0")
    assert_serves(site, "two", 1)
    site.server.instead.clear()
    assert site.operator.wait_settled("two").outcome == "committed"
    assert_serves(site, "two", 2)


@pytest.fixture
def full(site: Site) -> Iterator[Site]:
    """The device, restarted with a reserve that no disk has."""
    reserve_bytes = site.device.config.update.disk_reserve_bytes
    _restart(site, disk_reserve_bytes=1 << 60, max_attempts=2)
    yield site
    _restart(site, disk_reserve_bytes=reserve_bytes, max_attempts=site.device.config.update.max_attempts)


def _restart(site: Site, **settings: int) -> None:
    site.device.stop()
    site.device.configure(update=settings)
    site.device.start()


def test_a_disk_without_room_is_told_and_nothing_is_half_written(full: Site) -> None:
    v2 = full.publish("three", 2)
    full.desire(v2)
    full.operator.wait(
        lambda: (m := full.operator.model("three")) and "interruption 4," in m.detail,
        "more than max_attempts",
    )
    model = full.wait_state("three", "waiting")
    assert (model.outcome, model.reason, model.version) == ("none", Reason.DISK_FULL, "1.0.0")
    assert_serves(full, "three", 1)
    assert_nothing_half_written(full)
    assert v2.digest not in full.state.rejected
    _restart(full, disk_reserve_bytes=0)  # somebody made room
    assert full.operator.wait_settled("three").outcome == "committed"
    assert_serves(full, "three", 2)


def test_an_older_release_needs_the_operators_word(site: Site) -> None:
    v1, v2 = site.publish("five", 1), site.publish("five", 2)
    site.install(v1)
    site.install(v2)
    (model,) = site.deploy(v1)
    assert (model.outcome, model.reason, model.version) == ("failed", Reason.ROLLBACK_REFUSED, "2.0.0")
    assert "--allow-downgrade" in model.detail
    assert v1.digest not in site.state.rejected
    assert_serves(site, "five", 2)
    site.operator.desire(*site.wanted.values(), downgrade=True)
    assert site.operator.wait_settled("five").outcome == "committed"
    assert_serves(site, "five", 1)


def test_metadata_that_has_expired_is_waited_out(site: Site, tmp_path: Path) -> None:
    """The last test of this device: it has then seen newer metadata than the others' registry has."""
    aged = site.registry.copy(tmp_path)
    v2 = make_bundle(tmp_path, "four", "2.0.0", 2, seed=2)
    aged.publish(v2)
    aged.refresh("--also", "root", "--expires-days-timestamp", "0.000001")
    site.server.folder = aged.folder
    time.sleep(1.1)  # expiry has a resolution of a second
    site.desire(v2)
    model = site.wait_state("four", "waiting")
    assert (model.reason, model.version) == (Reason.TRUST_EXPIRED, "1.0.0")
    assert_serves(site, "four", 1)
    aged.refresh("--also", "root", "--expires-days-timestamp", "1")
    assert site.operator.wait_settled("four").outcome == "committed"
    assert_serves(site, "four", 2)


def test_a_registry_that_was_never_there_holds_up_nothing_but_the_order(make_site: MakeSite) -> None:
    """A new device does not know whose orders to take before it has reached the registry."""
    site = make_site(start="")
    site.server.stop()
    site.device.start()
    site.operator.wait_online()
    site.desire()
    site.operator.wait(lambda: site.operator.state and site.state.refused, "the reason")
    assert "[unsigned]" in site.state.refused
    assert "connection refused" in site.state.refused
    site.device.wait_serving()
    site.server.start()
    site.operator.wait(lambda: site.state.generation == site.operator.generation, "the acceptance")
    assert site.state.refused == ""
    assert [e.reason for e in site.operator.events("refused")] == [Reason.UNSIGNED]


# --- operators: signed by whom, and since when ---


@pytest.fixture
def signed(tmp_path: Path) -> TufRepository:
    """A registry whose operators can be changed."""
    return TufRepository(tmp_path / "signed")


@dataclass
class Post:
    """A device of such a registry, not started yet."""

    device: Device
    operator: Operator
    repository: TufRepository
    server: FolderServer

    def refused(self, reason: Reason) -> list[wire.Event]:
        return [event for event in self.operator.events("refused") if event.reason is reason]


@pytest.fixture
def post(mosquitto: Mosquitto, signed: TufRepository) -> Iterator[Post]:
    name = f"box-{uuid.uuid4().hex[:8]}"
    with FolderServer(signed.folder) as server:
        device = Device(name, broker=mosquitto, registry_url=server.url, root=signed.root_path)
        with Operator(mosquitto.host, mosquitto.port, TENANT, name, signed.operators[0]) as operator:
            yield Post(device, operator, signed, server)
        print(device.log)
        device.close()


def test_a_command_before_the_first_keys_is_held_and_then_answered(post: Post) -> None:
    operator = post.operator
    post.server.instead["metadata/timestamp.json"] = stall(1.5)
    post.device.start("run")
    operator.wait_online()
    operator.publish(operator.topics.command, operator.signed_command("status", "early", {}))
    for number in range(9):
        garbage = operator.signed_command("status", f"g{number}", {}, key=Ed25519PrivateKey.generate())
        operator.publish(operator.topics.command, garbage)
    post.server.instead.clear()
    (answer,) = operator.wait(lambda: operator.on(operator.topics.result), "the answer")
    assert wire.decode(answer.payload, wire.Result).id == "early"


def test_a_folder_in_the_place_of_the_operators_keys_keeps_nothing_from_starting(post: Post) -> None:
    """As a filesystem check may leave it. The keys are fetched again."""
    (post.device.layout.trust / "operators.json" / "lost").mkdir(parents=True)
    post.device.start("run")
    post.operator.wait_online()
    answer = post.operator.wait(lambda: post.operator.command("status").ok, "the answer")
    assert answer
    details = [e.detail for e in post.operator.events("storage")]
    assert any("operators' keys cannot be read" in detail for detail in details), details


def test_an_operator_who_was_removed_is_obeyed_no_longer(post: Post) -> None:
    operator, repository = post.operator, post.repository
    post.device.start("run")
    operator.wait_online()
    assert operator.command("status").ok
    old, new = repository.operators[0], Ed25519PrivateKey.generate()
    repository.operators = [new]
    repository.sign()
    # The first message by a key that the device does not know lets it look for new ones.
    operator.publish(operator.topics.command, operator.signed_command("status", "first", {}, key=new))
    operator.wait(lambda: post.refused(Reason.UNSIGNED), "the refusal of a key that is not known yet")
    operator.key = new
    operator.desire()  # a desired state is held until the keys are fetched
    operator.wait(lambda: operator.state and operator.state.generation == operator.generation, "new keys")
    assert operator.command("status").ok
    before = len(post.refused(Reason.UNSIGNED))
    operator.publish(operator.topics.command, operator.signed_command("status", "removed", {}, key=old))
    operator.wait(lambda: len(post.refused(Reason.UNSIGNED)) > before, "the refusal of the old key")


def test_two_of_three_operators_must_sign(post: Post) -> None:
    operator, repository = post.operator, post.repository
    repository.operators = [Ed25519PrivateKey.generate() for _ in range(3)]
    repository.operator_threshold = 2
    repository.sign()
    post.device.start("run")
    operator.wait_online()
    one, two = repository.operators[:2]
    alone = operator.signed_command("status", "alone", {}, key=one)
    operator.publish(operator.topics.command, alone)
    operator.wait(lambda: post.refused(Reason.SIGNATURE_INVALID), "the refusal of one signature")
    twice = _joined(alone, alone)
    operator.publish(operator.topics.command, twice)
    operator.wait(lambda: len(post.refused(Reason.SIGNATURE_INVALID)) > 1, "the refusal of one key, twice")
    both = _joined(alone, operator.signed_command("status", "alone", {}, key=two, **_times(alone)))
    operator.publish(operator.topics.command, both)
    operator.wait(lambda: operator.on(operator.topics.result), "the answer")


def _joined(one: bytes, other: bytes) -> bytes:
    """One envelope with the signatures of two over the same payload."""
    first, second = json.loads(one), json.loads(other)
    assert first["payload"] == second["payload"]
    return json.dumps({**first, "signatures": first["signatures"] + second["signatures"]}).encode()


def _times(envelope: bytes) -> dict[str, int]:
    command = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    return {key: command[key] for key in ("issued_ms", "expires_ms")}


def test_forged_commands_are_counted_and_bring_no_load_to_the_registry(post: Post) -> None:
    operator = post.operator
    post.device.start("run")
    operator.wait_online()
    assert operator.command("status").ok
    post.server.seen.clear()
    forged = operator.signed_command("status", "forged", {}, key=Ed25519PrivateKey.generate())
    for _ in range(2000):
        operator.publish(operator.topics.command, forged)
    assert operator.command("status").ok
    assert len(post.refused(Reason.UNSIGNED)) < 100
    asked = [seen for seen in post.server.seen if seen.path.endswith("timestamp.json")]
    assert len(asked) <= 5
