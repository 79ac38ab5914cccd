"""Device profiles: the ones that ship with edgeward, by name, or a TOML file of the user's.

It finds and decodes them; what a profile says is defined in edge_contract/profile.py.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path

from edge_contract import canonical
from edge_contract.errors import InputRejected, Reason
from edge_contract.profile import Profile

_SUFFIX = ".toml"


def names() -> list[str]:
    """Names of the profiles that ship with edgeward, sorted."""
    found = (entry.name for entry in files("device_profiles").iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX))


def load(name_or_path: str) -> Profile:
    """The shipped profile of that name, else the file at that path.

    Raises InputRejected: unknown name, unreadable file, unknown key, wrong type.
    """
    if name_or_path in names():
        shipped = files("device_profiles").joinpath(name_or_path + _SUFFIX)
        return decode(shipped.read_bytes(), name_or_path)
    path = Path(name_or_path)
    if path.is_file():
        return decode(path.read_bytes(), str(path))
    raise _unknown(name_or_path)


def decode(data: bytes, source: str) -> Profile:
    """The profile in the TOML document `data`; `source` names it in errors. Raises InputRejected."""
    try:
        profile = canonical.from_builtins(tomllib.loads(data.decode("utf-8")), Profile)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise _bad(source, f"not TOML: {e}") from e
    except canonical.DecodeFault as e:
        raise _bad(source, f"{e.problem} at {e.path}") from e
    _check(profile, source)
    return profile


def digest(profile: Profile) -> str:
    """SHA-256 of what the profile says, whatever its comments and layout."""
    return canonical.sha256_hex(canonical.to_bytes(profile))


def _check(profile: Profile, source: str) -> None:
    """What types alone cannot say."""
    quantization = profile.quantization
    if len(set(quantization.prefer)) != len(quantization.prefer):
        raise _bad(source, "a recipe is named twice at $.quantization.prefer")
    if "fp16" in quantization.prefer and not quantization.fp16:
        raise _bad(source, "fp16 is preferred although fp16 = false at $.quantization.prefer")


def _bad(source: str, problem: str) -> InputRejected:
    return InputRejected(
        Reason.BAD_CONFIG,
        f"profile {source}: {problem}",
        "correct it; device_profiles/README.md explains every key",
    )


def _unknown(name: str) -> InputRejected:
    known = names()
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f"did you mean {close[0]}? " if close else ""
    return InputRejected(
        Reason.UNKNOWN_PROFILE,
        f"no device profile is called {name!r}, and no such file exists",
        f"{hint}known: {', '.join(known)}; or give the path of a TOML file",
    )
