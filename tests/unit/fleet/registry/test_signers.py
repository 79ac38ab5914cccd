"""Keys that are not files: in a PKCS#11 module (SoftHSM2, the real program against it), in key services.

The key services stand behind securesystemslib's own seam: a signer class for the scheme of a URI.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import Result
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    Key,
    Signature,
    Signer,
    SSlibKey,
)
from tuf.api.metadata import Metadata, Root

from tests.support.ngclient import Client
from tests.support.registry_folder import RegistryFolder
from tests.support.softhsm import SoftHsm
from tests.unit.fleet import samples

Run = Callable[..., Result]
Refused = Callable[..., str]
Fleet = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    return SoftHsm(tmp_path_factory.mktemp("hsm") / "softhsm", keys=3)


@pytest.fixture
def made(tmp_path: Path) -> RegistryFolder:
    return RegistryFolder.create(tmp_path)


@pytest.fixture
def fleet(hsm: SoftHsm, made: RegistryFolder) -> Fleet:
    """The program in a process of its own, which loads the module."""

    def run(*words: object, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", "from fleet.cli import main; main()", "registry", *map(str, words)]
        line += ["--keys", str(made.keys)]
        environment = {**os.environ, **hsm.environment, **changes}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def roles(made: RegistryFolder) -> Root:
    return Metadata[Root].from_file(str(made.folder / "root.json")).signed


def test_a_root_key_moves_into_a_security_module(
    made: RegistryFolder, fleet: Fleet, hsm: SoftHsm, tmp_path: Path
) -> None:
    device = Client(made.folder, tmp_path / "device", made.root.read_bytes())
    assert device.find("operators.json") is not None
    fleet("keys", "rotate", made.folder, "root", "--uri", hsm.uri(1))
    assert not (made.keys / "root.pem").exists()
    assert (made.keys / "root.uri").exists() or list(made.keys.glob("root.*.uri"))
    (keyid,) = roles(made).roles["root"].keyids
    assert roles(made).keys[keyid].keytype == "ecdsa"
    assert device.find("operators.json") is not None
    fleet("refresh", made.folder, "--also", "root")
    assert roles(made).version == 3
    assert device.find("operators.json") is not None
    wrong = fleet("refresh", made.folder, "--also", "root", code=2, EDGEWARD_KEY_PIN="0000")
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert "PinIncorrect" in wrong.stderr
    assert roles(made).version == 3
    gone = fleet("refresh", made.folder, "--also", "root", code=2, PYKCS11LIB="/nowhere.so")
    assert len(gone.stderr.strip().splitlines()) == 1
    assert "PYKCS11LIB" in gone.stderr


def test_a_threshold_over_a_file_and_two_modules(
    made: RegistryFolder, fleet: Fleet, hsm: SoftHsm, tmp_path: Path
) -> None:
    device = Client(made.folder, tmp_path / "device", made.root.read_bytes())
    uris = ("--uri", hsm.uri(2), "--uri", hsm.uri(3))
    fleet("keys", "add", made.folder, "targets", *uris, "--threshold", "2")
    assert roles(made).roles["targets"].threshold == 2
    assert device.find("operators.json") is not None
    (made.keys / "targets.pem").unlink()
    fleet("refresh", made.folder, "--also", "targets")
    assert device.find("operators.json") is not None


class KeyService(Signer):
    """A cloud's key service as securesystemslib sees one: keys by path, signatures from elsewhere."""

    keys: ClassVar[dict[str, CryptoSigner]] = {}
    down = False

    def __init__(self, path: str, public_key: Key) -> None:
        self._path, self._public = path, public_key

    @classmethod
    def import_(cls, *path: str) -> tuple[str, SSlibKey]:
        name = "/".join(path)
        uri = f"{cls.scheme}:{name}"
        return uri, cls.keys.setdefault(name, CryptoSigner.generate_ecdsa()).public_key

    scheme = "awskms"

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: Any = None) -> KeyService:
        return cls(priv_key_uri.partition(":")[2], public_key)

    @property
    def public_key(self) -> Key:
        return self._public

    def sign(self, payload: bytes) -> Signature:
        if self.down:
            raise ConnectionError("the service does not answer")
        return self.keys[self._path].sign(payload)


@pytest.mark.parametrize(
    ("scheme", "uri", "path"),
    [
        ("awskms", "awskms:alias/edge-targets", "alias/edge-targets"),
        ("gcpkms", "gcpkms:projects/p/cryptoKeyVersions/1", "projects/p/cryptoKeyVersions/1"),
        ("azurekms", "azurekms://vault.vault.azure.net/keys/edge/0", "vault/edge"),
    ],
)
def test_a_key_in_a_cloud(
    made: RegistryFolder,
    tmp_path: Path,
    run: Run,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    uri: str,
    path: str,
) -> None:
    service = type("Service", (KeyService,), {"scheme": scheme, "keys": {}, "down": False})
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, scheme, service)
    monkeypatch.setenv("EDGEWARD_KEYS", str(made.keys))
    device = Client(made.folder, tmp_path / "device", made.root.read_bytes())
    run("registry", "keys", "rotate", made.folder, "targets", "--uri", uri)
    assert list(service.keys) == [path]  # type: ignore[attr-defined]
    samples.bundle(tmp_path / "bundle")
    run("registry", "publish", made.folder, tmp_path / "bundle")
    assert device.find("models/fashion/1.0.0.json") is not None
    service.down = True  # type: ignore[attr-defined]
    before = sorted((made.folder / "metadata").iterdir())
    again = ("registry", "refresh", made.folder, "--also", "targets")
    line = refused(*again, code=2, reason="trust_failed")
    assert "does not answer" in line
    assert sorted((made.folder / "metadata").iterdir()) == before


@pytest.fixture
def service(made: RegistryFolder, monkeypatch: pytest.MonkeyPatch) -> type[KeyService]:
    """The cloud behind `awskms:`."""
    found = type("Service", (KeyService,), {"scheme": "awskms", "keys": {}, "down": False})
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "awskms", found)
    monkeypatch.setenv("EDGEWARD_KEYS", str(made.keys))
    return found


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_a_key_whose_service_is_gone_is_replaced(
    made: RegistryFolder, service: type[KeyService], tmp_path: Path, run: Run, role: str
) -> None:
    device = Client(made.folder, tmp_path / "device", made.root.read_bytes())
    run("registry", "keys", "rotate", made.folder, role, "--uri", "awskms:alias/old")
    service.down = True
    result = run("registry", "keys", "rotate", made.folder, role, "--insecure-no-password")
    assert "does not answer" in result.stderr
    (keyid,) = roles(made).roles[role].keyids
    assert roles(made).keys[keyid].keytype == "ed25519"
    assert not list(made.keys.glob(f"{role}*.uri"))
    assert device.find("operators.json") is not None


def test_one_dead_root_key_of_two_is_replaced_by_the_other(
    made: RegistryFolder, service: type[KeyService], run: Run
) -> None:
    run("registry", "keys", "rotate", made.folder, "root", "--uri", "awskms:alias/old")
    run("registry", "keys", "add", made.folder, "root", "--insecure-no-password")
    (dead,) = [k for k in roles(made).roles["root"].keyids if roles(made).keys[k].keytype == "ecdsa"]
    # The dead one is found first.
    (made.keys / "root.pem").rename(made.keys / "root.3.pem")
    service.down = True
    again = ("--only", dead, "--insecure-no-password")
    run("registry", "keys", "rotate", made.folder, "root", *again)
    assert dead not in roles(made).roles["root"].keyids


@pytest.mark.parametrize("role", ["root", "targets", "timestamp"])
def test_a_new_key_that_does_not_sign_changes_nothing(
    made: RegistryFolder, service: type[KeyService], refused: Refused, role: str
) -> None:
    service.down = True
    before = sorted(p for p in made.folder.parent.rglob("*") if p.is_file())
    words = ("registry", "keys", "rotate", made.folder, role, "--uri", "awskms:alias/new")
    line = refused(*words, code=2, reason="trust_failed")
    assert "nothing was published" in line
    assert sorted(p for p in made.folder.parent.rglob("*") if p.is_file()) == before


def test_a_killed_rotation_into_a_service_ends_there(
    made: RegistryFolder, service: type[KeyService], tmp_path: Path, run: Run
) -> None:
    rotate = ("keys", "rotate", "targets", "--uri", "awskms:alias/new")
    states = made.states_while(*rotate)
    for state in states[:-2]:
        made.put_back(state)
        made.run(*rotate)
        (keyid,) = roles(made).roles["targets"].keyids
        assert roles(made).keys[keyid].keytype == "ecdsa"
        assert [p.name for p in made.keys.glob("targets*") if ".retired-" not in p.name] == ["targets.2.uri"]


@pytest.mark.parametrize(
    ("uri", "module", "missing", "extra"),
    [
        ("hsm:1", "_hsm_signer", "PKCS11_IMPORT_ERROR", "fleet-pkcs11"),
        ("awskms:alias/x", "_aws_signer", "AWS_IMPORT_ERROR", "fleet-aws"),
        ("gcpkms:projects/p", "_gcp_signer", "GCP_IMPORT_ERROR", "fleet-gcp"),
        ("azurekms://v.vault.azure.net/keys/x/1", "_azure_signer", "AZURE_IMPORT_ERROR", "fleet-azure"),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(
    registry: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
    module: str,
    missing: str,
    extra: str,
) -> None:
    monkeypatch.setattr(f"securesystemslib.signer.{module}.{missing}", "not here")
    words = ("registry", "keys", "rotate", registry, "targets", "--uri", uri)
    assert f"edgeward[{extra}]" in refused(*words, code=2, reason="runtime_missing")


def test_uris_that_name_nothing(registry: Path, refused: Refused) -> None:
    for uri in ("", "targets", "ftp:x", "azurekms:x"):
        refused("registry", "keys", "add", registry, "targets", "--uri", uri, code=2, reason="bad_input")
    (registry.parent / "keys" / "targets.pem").unlink()
    (registry.parent / "keys" / "targets.uri").write_text("awskms:alias/x")
    line = refused("registry", "refresh", registry, "--also", "targets", code=2, reason="bad_input")
    assert "--uri" in line
