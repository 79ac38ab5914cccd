"""Pure: which role's metadata names which target, and when a role spreads its targets over hash bins.

    targets                operators.json, delegations, and the registry's own versions while they are few
      team-NAME            a team's versions (models that match the team's patterns, nobody else's)
      models               the registry's own versions once they are many
        models.BITS-HEX    its hash bins; a team has bins of its own in the same way

A client fetches one role of each level, so none may become large.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from edge_contract import encodings

TOP = "targets"
MODELS = "models"
MODELS_PATHS = ("models/*/*",)
# Versions that one metadata file names at most, on average: 64 of them take about 11 kB.
FULL = 64
# Old bins stay in the snapshot for ever (clients refuse one that forgets a role), so they grow in few steps.
_STEP_BITS = 2
MAX_BITS = 16

TEAM = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
PATTERN = re.compile(r"[a-z0-9*?\[\]._-]{1,64}")
_TEAM_PREFIX = "team-"


def is_model(name: str) -> bool:
    """Whether a target is a model's manifest, as edge_contract.manifest.target_name names it."""
    return is_shelved(name) and not name.endswith(encodings.SUFFIX)


def is_shelved(name: str) -> bool:
    """Whether a target belongs to a version: its manifest, or the encodings of its blobs."""
    return fnmatchcase(name, MODELS_PATHS[0]) and name.count("/") == 2


def encodings_of(name: str) -> str:
    """The target of a version's encodings, by that of its manifest."""
    return name.removesuffix(".json") + encodings.SUFFIX


def model_of(name: str) -> str:
    """The model of a manifest's target."""
    return name.split("/")[1]


def bits_for(versions: int, bits: int = 0) -> int:
    """Bits of the bins' numbers for so many versions, never fewer than before; 0 means no bins."""
    while versions > FULL << bits and bits < MAX_BITS:
        bits += _STEP_BITS
    return bits


def bin_prefix(shelf: str, bits: int) -> str:
    """What the names of a role's bins begin with. A team's name has no dot, so it cannot look like one."""
    return f"{shelf}.{bits}"


def team_role(team: str) -> str:
    """The role of a team."""
    return f"{_TEAM_PREFIX}{team}"


def team_of(role: str) -> str | None:
    """The team of a role, if it is one's."""
    return role.removeprefix(_TEAM_PREFIX) if role.startswith(_TEAM_PREFIX) else None


def key_name(role: str) -> str:
    """Whose keys sign for a role: bins are signed with the keys of what they belong to."""
    shelf = role.partition(".")[0]
    return TOP if shelf == MODELS else shelf


def paths_of(pattern: str) -> str:
    """The targets of the models that match a pattern."""
    return f"models/{pattern}/*"


def pattern_of(path: str) -> str:
    """The other way round."""
    return path.split("/")[1]


def matches(pattern: str, model: str) -> bool:
    """Whether a model's name matches a pattern, as TUF has it."""
    return fnmatchcase(model, pattern)
