"""A device with its operator and the registry both know, ended and removed when their fixture is."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_contract import wire
from tests.support.broker import Mosquitto
from tests.support.device import TENANT, Device
from tests.support.http_registry import FolderServer
from tests.support.models import BundleOnDisk, make_bundle
from tests.support.operator import Operator
from tests.support.registry_folder import RegistryFolder


@dataclass
class Site:
    """A device with its operator, and the registry both know. `wanted` is the set that was deployed last.

    Between two tests it is forgotten, so that the next deployment removes it, unless `keep` is set.
    """

    device: Device
    operator: Operator
    registry: RegistryFolder
    server: FolderServer
    folder: Path
    wanted: dict[str, BundleOnDisk] = field(default_factory=dict)
    keep: bool = False

    def publish(self, name: str, version: int = 1, **options: Any) -> BundleOnDisk:
        """Make and publish `name`@`version`.0.0 of the standard net; `options` are make_bundle's."""
        options = {"seed": version} | options
        bundle = make_bundle(self.folder, name, f"{version}.0.0", version, **options)
        self.registry.publish(bundle)
        return bundle

    def desire(self, *bundles: BundleOnDisk) -> None:
        """Send the set of before with these replaced or added."""
        self.wanted |= {b.manifest.name: b for b in bundles}
        self.operator.desire(*self.wanted.values())

    def deploy(self, *bundles: BundleOnDisk, timeout_s: float = 30.0) -> list[wire.ModelState]:
        """`desire`, and wait until each attempt is over."""
        self.desire(*bundles)
        return [self.operator.wait_settled(b.manifest.name, timeout_s) for b in bundles]

    def install(self, *bundles: BundleOnDisk) -> None:
        """`deploy` what must succeed."""
        for model in self.deploy(*bundles):
            assert model.outcome == "committed", model

    def drop(self, *names: str) -> None:
        """Take models out of the set and wait until they are gone."""
        for name in names:
            self.wanted.pop(name, None)
        self.operator.desire(*self.wanted.values())
        self.operator.wait(
            lambda: not {m.name for m in self.state.models} & set(names), f"{names} to be gone"
        )

    @property
    def state(self) -> wire.State:
        """What the device reported last."""
        state = self.operator.state
        assert state is not None
        return state

    def wait_state(self, name: str, *states: str, timeout_s: float = 20.0) -> wire.ModelState:
        """Until the model is reported in one of `states`."""

        def look() -> wire.ModelState | None:
            model = self.operator.model(name)
            return model if model is not None and model.state in states else None

        found = self.operator.wait(look, f"{name} to be {' or '.join(states)}", timeout_s)
        assert found is not None
        return found


MakeSite = Callable[..., Site]


def sites(mosquitto: Mosquitto, registry: RegistryFolder, folder: Path) -> Iterator[MakeSite]:
    """Make devices, each with a server of its own over the registry; all end with the fixture."""
    closing: list[Callable[[], object]] = []

    def make(
        *,
        start: str = "up",
        registry: RegistryFolder = registry,
        broker: Mosquitto = mosquitto,
        broker_settings: Mapping[str, Any] | None = None,
        **settings: Mapping[str, Any],
    ) -> Site:
        """`settings` are sections of the agent's TOML file."""
        if broker_settings:
            settings["broker"] = broker_settings
        server = FolderServer(registry.folder)
        server.start()
        closing.append(server.stop)
        name = f"box-{uuid.uuid4().hex[:8]}"
        device = Device(name, broker=broker, registry_url=server.url, root=registry.root, settings=settings)
        closing.append(device.close)
        operator = Operator(mosquitto.host, mosquitto.port, TENANT, name, registry.operator_key)
        operator.__enter__()
        closing.append(lambda: operator.__exit__(None, None, None))
        if start:
            device.start(start)
            operator.wait_online()
        if start == "up":
            device.wait_serving()
        return Site(device, operator, registry, server, folder / name)

    yield make
    for close in reversed(closing):
        close()
