"""Pure: which candidate a device gets, and why each other one does not.

Measured values in, `Choice | Refusal` out. If the machine that measured ranks candidates as the device
would, the fastest within the budgets wins; if not, the profile's order of preference decides. The scores
on the test split play no part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from msgspec import Struct

from edge_contract.bench import Measured
from edge_contract.errors import Reason
from edge_contract.profile import KERNEL_GROUPS, Facts, Profile, RecipeName, speaks_for
from optimizer import text

# Latencies this close are the same; the smaller file wins then.
TIE = 0.03
REFERENCE = "fp32"
_EPSILON = 1e-12

Outcome = Literal["won", "lost", "failed"]


class Accuracy(Struct, frozen=True, forbid_unknown_fields=True):
    """A candidate's score on a split beside FP32's on the same samples. `drop` is positive if worse.

    `drop_low`, `drop_high`: 95 % interval of the drop, None where the metric gives one number for all.
    """

    value: float
    fp32_value: float
    drop: float
    samples: int
    drop_low: float | None = None
    drop_high: float | None = None


class Scored(Struct, frozen=True, forbid_unknown_fields=True, tag="scored"):
    """A candidate that loads, answers and was measured."""

    name: str
    family: RecipeName
    settings: str
    accuracy: Accuracy
    measured: Measured


class Broken(Struct, frozen=True, forbid_unknown_fields=True, tag="broken"):
    """A candidate that could not be built, loaded, run or measured; `stage` is where it ended."""

    name: str
    family: RecipeName
    settings: str
    stage: Literal["build", "evaluate", "measure"]
    reason: Reason
    what: str


Candidate = Scored | Broken


class Verdict(Struct, frozen=True, forbid_unknown_fields=True):
    """How one candidate came out, in one sentence."""

    name: str
    outcome: Outcome
    why: str


class Choice(Struct, frozen=True, forbid_unknown_fields=True, tag="choice"):
    """The candidate to ship. `decided_by`: latency measured for this kind of device, or preference."""

    name: str
    decided_by: Literal["latency", "preference"]
    why: str
    verdicts: list[Verdict]


class Refusal(Struct, frozen=True, forbid_unknown_fields=True, tag="refusal"):
    """Nothing fits. `nearest` misses by the least."""

    nearest: str
    decided_by: Literal["latency", "preference"]
    why: str
    verdicts: list[Verdict]


class Rules(Struct, frozen=True):
    """What a choice goes by. `points`: the metric is a share of samples, told in percentage points."""

    profile: Profile
    machine: Facts
    max_drop: float
    points: bool


class _Miss(Struct, frozen=True):
    """One rule a candidate breaks; `excess` is by how much, as a share of the limit."""

    why: str
    excess: float


class _Contest(Struct, frozen=True):
    """Who won among those within the budgets, why, and why each other one did not."""

    winner: Scored
    why: str
    others: dict[str, str]


def choose(candidates: list[Candidate], rules: Rules) -> Choice | Refusal:
    """The choice among `candidates`, FP32 among them and scored."""
    scored = [c for c in candidates if isinstance(c, Scored)]
    misses = {c.name: _misses(c, rules) for c in scored}
    fitting = [c for c in scored if not misses[c.name]]
    if not fitting:
        return _refusal(candidates, scored, misses, rules)
    contest = _by_latency(fitting, rules) if machine_gap(rules) is None else _by_preference(fitting, rules)
    verdicts = [_verdict(c, contest, misses) for c in candidates]
    return Choice(contest.winner.name, _decided_by(rules), contest.why, verdicts)


def machine_gap(rules: Rules) -> str | None:
    """Why latencies of the measuring machine do not speak for the profile's device; None if they do."""
    profile, machine = rules.profile, rules.machine
    if machine.architecture != profile.architecture:
        return f"it is {machine.architecture}, not {profile.architecture}"
    if not speaks_for(machine, profile):
        kernel_flags = frozenset().union(*KERNEL_GROUPS)
        found = ", ".join(sorted(kernel_flags & set(machine.isa))) or "none"
        return f"of the instruction sets that choose kernels it has {found}, not {', '.join(profile.isa)}"
    if machine.cores < profile.session.threads:
        return f"it has {machine.cores} cores for {profile.session.threads} threads"
    return None


def _misses(candidate: Scored, rules: Rules) -> list[_Miss]:
    """Everything that keeps a candidate from being chosen."""
    found = [
        _accuracy_miss(candidate.accuracy, rules),
        _over("file", candidate.measured.size_bytes, rules.profile.budget.size_bytes, text.size),
        _fp16_miss(candidate, rules.profile),
        _over("peak memory", candidate.measured.peak_rss_bytes, rules.profile.budget.memory_bytes, text.size),
    ]
    if machine_gap(rules) is None:
        limit = rules.profile.budget.latency_p95_ms
        found.append(_over("p95 latency", candidate.measured.p95_ms, limit, text.milliseconds))
        found.append(_speed_miss(candidate))
    else:
        found.append(_preference_miss(candidate, rules.profile))
    return [miss for miss in found if miss]


def _accuracy_miss(accuracy: Accuracy, rules: Rules) -> _Miss | None:
    if accuracy.drop <= rules.max_drop + _EPSILON:
        return None
    lost = text.drop(accuracy.drop, points=rules.points)
    allowed = text.drop(rules.max_drop, points=rules.points)
    excess = (accuracy.drop - rules.max_drop) / max(rules.max_drop, _EPSILON)
    return _Miss(f"accuracy drop {lost}, over the {allowed} allowed", excess)


def _over(what: str, value: float, limit: float | None, word: Callable[[float], str]) -> _Miss | None:
    if limit is None or value <= limit:
        return None
    return _Miss(
        f"{what} {word(value)}, over the budget of {word(limit)} by {word(value - limit)}",
        (value - limit) / max(limit, _EPSILON),
    )


def _speed_miss(candidate: Scored) -> _Miss | None:
    ratio = candidate.measured.ratio
    if candidate.name == REFERENCE or ratio <= 1:
        return None
    return _Miss(f"slower than FP32: {_times(ratio)} its latency", ratio - 1)


def _fp16_miss(candidate: Scored, profile: Profile) -> _Miss | None:
    """Without kernels for it the runtime computes in FP32 between conversions: at best as fast, by luck."""
    if candidate.family != "fp16" or profile.quantization.fp16:
        return None
    return _Miss("the profile says that its device has no FP16 kernels", 1.0)


def _preference_miss(candidate: Scored, profile: Profile) -> _Miss | None:
    if candidate.family in _order(profile) or _fp16_miss(candidate, profile):
        return None
    return _Miss(f"the profile does not name {candidate.family} among what its device prefers", 1.0)


def _by_latency(fitting: list[Scored], rules: Rules) -> _Contest:
    """The fastest; among equally fast ones the smallest, then the most accurate."""
    best = min(_ratio(c) for c in fitting)
    tied = [c for c in fitting if _ratio(c) <= best * (1 + TIE)]
    winner = min(tied, key=lambda c: (c.measured.size_bytes, c.accuracy.drop, _ratio(c), c.name))
    others = {c.name: _slower_words(c, winner, tied) for c in fitting}
    lead = _lead_words(winner, best)
    why = f"{lead}, {_accuracy_words(winner, rules)}, {text.size(winner.measured.size_bytes)}"
    return _Contest(winner, why, others)


def _by_preference(fitting: list[Scored], rules: Rules) -> _Contest:
    """The first in the profile's order; of one family the most accurate, then the smallest."""
    order = _order(rules.profile)
    winner = min(
        fitting, key=lambda c: (order.index(c.family), c.accuracy.drop, c.measured.size_bytes, c.name)
    )
    others = {c.name: _less_preferred_words(c, winner) for c in fitting}
    of_family = sum(c.family == winner.family for c in fitting)
    most = ", of its kind the most accurate" if of_family > 1 else ""
    why = (
        f"first in the profile's order of preference ({' > '.join(order)}) within accuracy, memory and"
        f" size{most}; {_accuracy_words(winner, rules)}, {text.size(winner.measured.size_bytes)}"
    )
    return _Contest(winner, why, others)


def _order(profile: Profile) -> list[RecipeName]:
    """The profile's preference; FP32 comes last where it is not named."""
    prefer = profile.quantization.prefer
    return prefer if "fp32" in prefer else [*prefer, "fp32"]


def _ratio(candidate: Scored) -> float:
    """FP32 is the reference by definition, whatever its own noise."""
    return 1.0 if candidate.name == REFERENCE else candidate.measured.ratio


def _verdict(candidate: Candidate, contest: _Contest, misses: dict[str, list[_Miss]]) -> Verdict:
    name = candidate.name
    if isinstance(candidate, Broken):
        return Verdict(name, "failed", broken_words(candidate))
    if name == contest.winner.name:
        return Verdict(name, "won", contest.why)
    return Verdict(name, "lost", text.join([miss.why for miss in misses[name]]) or contest.others[name])


def broken_words(candidate: Broken) -> str:
    """Where and why a candidate ended."""
    stage = {"build": "could not be built", "evaluate": "failed when run", "measure": "could not be measured"}
    return f"{stage[candidate.stage]}: {candidate.what}"


def _slower_words(candidate: Scored, winner: Scored, tied: list[Scored]) -> str:
    if candidate not in tied:
        return f"slower than {winner.name}: {_times(_ratio(candidate) / _ratio(winner))} its latency"
    fast = f"as fast as {winner.name} within {TIE:.0%}"
    if candidate.measured.size_bytes > winner.measured.size_bytes:
        return f"{fast}, but {_times(candidate.measured.size_bytes / winner.measured.size_bytes)} its size"
    return f"{fast} and of the same size, but not more accurate"


def _less_preferred_words(candidate: Scored, winner: Scored) -> str:
    if candidate.family != winner.family:
        return f"within the budgets, but the profile prefers {winner.family} to {candidate.family}"
    if candidate.accuracy.drop > winner.accuracy.drop:
        return f"within the budgets, but less accurate than {winner.name}"
    return f"within the budgets, as accurate as {winner.name} and no smaller"


def _accuracy_words(winner: Scored, rules: Rules) -> str:
    accuracy = winner.accuracy
    if winner.name == REFERENCE:
        return f"accuracy {text.share(accuracy.value, points=rules.points)}"
    if accuracy.drop < 0:
        return f"accuracy {text.drop(-accuracy.drop, points=rules.points)} above FP32's"
    lost, allowed = (text.drop(value, points=rules.points) for value in (accuracy.drop, rules.max_drop))
    return f"accuracy drop {lost} of {allowed} allowed"


def _lead_words(winner: Scored, best: float) -> str:
    p50 = text.milliseconds(winner.measured.p50_ms)
    ratio = _ratio(winner)
    if winner.name == REFERENCE:
        rivals = (
            "nothing within the budgets is faster than" if ratio == best else "nothing smaller is faster than"
        )
        return f"{rivals} clean FP32 (p50 {p50})"
    place = "the fastest" if ratio == best else f"within {TIE:.0%} of the fastest and smaller"
    return f"{ratio:.2f}× the latency of FP32 (p50 {p50}), {place} within the budgets"


def _decided_by(rules: Rules) -> Literal["latency", "preference"]:
    return "latency" if machine_gap(rules) is None else "preference"


def _refusal(
    candidates: list[Candidate], scored: list[Scored], misses: dict[str, list[_Miss]], rules: Rules
) -> Refusal:
    nearest = min(scored, key=lambda c: (sum(miss.excess for miss in misses[c.name]), c.name))
    by = text.join([miss.why for miss in misses[nearest.name]])
    verdicts = [
        Verdict(c.name, "failed", broken_words(c))
        if isinstance(c, Broken)
        else Verdict(c.name, "lost", text.join([miss.why for miss in misses[c.name]]))
        for c in candidates
    ]
    why = f"no candidate meets the budgets of {rules.profile.name}; the nearest is {nearest.name}: {by}"
    return Refusal(nearest.name, _decided_by(rules), why, verdicts)


def _times(factor: float) -> str:
    return f"{factor:.2f}×" if factor < 10 else f"{factor:.0f}×"
