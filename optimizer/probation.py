"""What a model is held to while it is new on a device, from a TOML file; manifest.py defines it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from edge_contract import canonical
from edge_contract.errors import InputRejected, Reason
from edge_contract.manifest import Probation


def load(path: Path) -> Probation:
    """Raises InputRejected: unreadable file, unknown key, wrong type."""
    try:
        return canonical.from_builtins(tomllib.loads(path.read_text(encoding="utf-8")), Probation)
    except OSError as e:
        problem = str(e.strerror)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        problem = f"not TOML: {e}"
    except canonical.DecodeFault as e:
        problem = f"{e.problem} at {e.path}"
    raise InputRejected(
        Reason.BAD_CONFIG,
        f"--probation {path}: {problem}",
        f"write TOML with any of {', '.join(Probation.__struct_fields__)}; docs/preflight.md explains them",
    )
