"""A real PKCS#11 module: SoftHSM2 with a token of its own in a folder. Keys are made in a child process,
because a process keeps the module's first configuration for ever."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PIN = "5678"
_LABEL = "edgeward"
_MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so")
_GENERATE = """
import os, sys, pkcs11
from pkcs11.util.ec import encode_named_curve_parameters as named
token = pkcs11.lib(os.environ["PYKCS11LIB"]).get_token(token_label=sys.argv[1])
with token.open(user_pin=sys.argv[2], rw=True) as session:
    curve = {pkcs11.Attribute.EC_PARAMS: named("secp256r1")}
    for number in range(1, int(sys.argv[3]) + 1):
        parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
        parameters.generate_keypair(id=bytes([number]), store=True)
"""


class SoftHsm:
    """A token with ECDSA keys number 1 to `keys`."""

    def __init__(self, folder: Path, keys: int) -> None:
        (folder / "tokens").mkdir(parents=True)
        config = folder / "softhsm2.conf"
        config.write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\n")
        module = next(path for path in _MODULES if Path(path).exists())
        self.environment = {"SOFTHSM2_CONF": str(config), "PYKCS11LIB": module, "EDGEWARD_KEY_PIN": PIN}
        tool = shutil.which("softhsm2-util", path=f"{os.environ['PATH']}:/usr/sbin") or "softhsm2-util"
        self._run(tool, "--init-token", "--free", "--label", _LABEL, "--so-pin", "1234", "--pin", PIN)
        self._run(sys.executable, "-c", _GENERATE, _LABEL, PIN, str(keys))

    def uri(self, number: int) -> str:
        """How a key is named."""
        return f"hsm:{number}?label={_LABEL}"

    def _run(self, *command: str) -> None:
        environment = {**os.environ, **self.environment}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
