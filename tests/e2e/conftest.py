"""One mosquitto and one registry for all tests here; devices of their own for each module or test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.broker import Mosquitto
from tests.support.registry_folder import RegistryFolder
from tests.support.site import MakeSite, Site, sites

__all__ = ["MakeSite", "Site"]


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> RegistryFolder:
    return RegistryFolder.create(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def make_site(mosquitto: Mosquitto, registry: RegistryFolder, tmp_path: Path) -> Iterator[MakeSite]:
    yield from sites(mosquitto, registry, tmp_path)


@pytest.fixture(scope="module")
def make_module_site(
    mosquitto: Mosquitto, registry: RegistryFolder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeSite]:
    yield from sites(mosquitto, registry, tmp_path_factory.mktemp("site"))


@pytest.fixture(autouse=True)
def alone_on_its_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Show what the device of the module wrote during a failed test; the next begins with an empty set."""
    site = request.getfixturevalue("site") if "site" in request.fixturenames else None
    before = len(site.device.log) if isinstance(site, Site) else 0
    yield
    if isinstance(site, Site):
        print(site.device.log[before:])
        if not site.keep:
            site.wanted.clear()
        site.server.instead.clear()
        site.server.rate_bytes_per_s = 0


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model's name that no other test uses."""
    return f"m{uuid.uuid4().hex[:10]}"
