"""Pure: what to ask of a device, and how to read from its reports whether it has done so.

No clock, no broker: driver.py brings both. A device keeps the outcome of its last attempt in its
report, so an outcome counts only if it is about our digest and not the one from before we asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edge_contract import wire
from edge_contract.errors import Reason

# A device that does not know a key fetches the operators' keys anew and looks at the message again.
KEYS_SETTLE_S = 20.0
_PERHAPS_NEW_KEYS = frozenset({Reason.UNSIGNED, Reason.SIGNATURE_INVALID})
_REASON = re.compile(r"\[([a-z_]+)\] →")

Outcome = Literal["committed", "failed", "reverted", "refused", "no_state", "no_answer"]


@dataclass(frozen=True, slots=True)
class Goal:
    """What one device was asked: `model` under `generation`, in the envelope of that digest.

    `before` is what it had reported until then.
    """

    model: wire.DesiredModel
    generation: int
    envelope_sha256: str
    before: wire.State


@dataclass(frozen=True, slots=True)
class Underway:
    """Not decided yet."""

    state: str
    progress: float = 0.0
    reason: Reason = Reason.OK
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """Decided, and why. Only `committed` is a success."""

    outcome: Outcome
    reason: Reason = Reason.OK
    detail: str = ""


def next_desired(
    wanted: wire.DesiredModel,
    *,
    tenant: str,
    device: str,
    state: wire.State,
    pending: wire.Desired | None,
    now_ms: int,
    expires_ms: int,
) -> wire.Desired:
    """The device's whole set with `wanted` replaced or added, under the next generation.

    `pending` is the retained desired state if an operator signed it. Where the device has not taken it
    yet it is the base, so that two deployments to a sleeping device add up.
    """
    waiting = pending is not None and pending.generation > state.generation and pending.expires_ms > now_ms
    base = pending.models if pending is not None and waiting else current_set(state)
    newest = max(state.generation, pending.generation if pending is not None else 0)
    return wire.Desired(
        schema=1,
        tenant=tenant,
        device=device,
        generation=newest + 1,
        issued_ms=now_ms,
        expires_ms=expires_ms,
        models=[*(m for m in base if m.name != wanted.name), wanted],
    )


def current_set(state: wire.State) -> list[wire.DesiredModel]:
    """What the device serves, and for a model in mid-update what it is about to serve."""
    found = []
    for model in state.models:
        moving = model.state not in ("idle", "reverting")
        version, digest = (
            (model.target_version, model.target_digest)
            if moving and model.target_digest is not None
            else (model.version, model.digest)
        )
        if version is not None and digest is not None:
            found.append(wire.DesiredModel(model.name, version, digest))
    return found


def judge(goal: Goal, state: wire.State, waited_s: float) -> Underway | Ended:
    """What a report says about our goal, `waited_s` after the broker took the message."""
    if state.generation < goal.generation:
        return _judge_refusal(goal, state, waited_s)
    model = next((m for m in state.models if m.name == goal.model.name), None)
    if model is None:
        return Underway("accepted")
    if model.state != "idle":
        return Underway(model.state, model.progress, model.reason, model.detail)
    return _judge_idle(goal, state, model)


def _judge_idle(goal: Goal, state: wire.State, model: wire.ModelState) -> Underway | Ended:
    ours = goal.model.manifest_sha256
    outcome = model.outcome
    if outcome in ("failed", "reverted") and model.target_digest == ours:
        known = next((m for m in goal.before.models if m.name == model.name), None)
        from_before = known is not None and (known.outcome, known.since_ms) == (outcome, model.since_ms)
        if not from_before:
            return Ended(outcome, model.reason, model.detail)
        if ours in state.rejected:
            return Ended(outcome, Reason.DIGEST_REJECTED_BEFORE, model.detail)
        return Underway("accepted")
    if model.digest == ours and outcome == "committed" and model.reason is not Reason.OK:
        return Underway("not loaded", 0.0, model.reason, model.detail)  # the disk names it, nothing serves
    if model.digest == ours:
        return Ended("committed")
    return Underway("accepted")


def _judge_refusal(goal: Goal, state: wire.State, waited_s: float) -> Underway | Ended:
    if state.refused_sha256 != goal.envelope_sha256:
        return Underway("sent")
    reason = _reason_in(state.refused)
    if reason in _PERHAPS_NEW_KEYS and waited_s < KEYS_SETTLE_S:
        return Underway("checking keys", 0.0, reason, state.refused)
    return Ended("refused", reason, state.refused)


def _reason_in(text: str) -> Reason:
    """The reason code in an error's text, as edge_contract.errors writes it."""
    found = _REASON.search(text)
    try:
        return Reason(found.group(1)) if found else Reason.NOT_ALLOWED
    except ValueError:  # a code of a newer version
        return Reason.NOT_ALLOWED
