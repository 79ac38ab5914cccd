"""Pure: errors named by who is at fault, and the reason codes that travel in reports.

Every error carries a stable `Reason`, one sentence that names the culprit, and the next step.
A programmer's mistake is not among them: that stays a RuntimeError.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Stable codes. They are part of the wire format: add, never rename."""

    # who asked
    BAD_INPUT = "bad_input"
    UNKNOWN_PROFILE = "unknown_profile"
    BAD_CONFIG = "bad_config"
    # the artifact
    MODEL_UNREADABLE = "model_unreadable"
    MODEL_UNSUPPORTED = "model_unsupported"
    DATA_MISMATCH = "data_mismatch"
    DATA_TOO_SMALL = "data_too_small"
    METRIC_FAILED = "metric_failed"
    NOTHING_FITS = "nothing_fits"
    # the bundle and its trust
    MANIFEST_INVALID = "manifest_invalid"
    DIGEST_MISMATCH = "digest_mismatch"
    TRUST_FAILED = "trust_failed"
    TRUST_EXPIRED = "trust_expired"
    CLOCK_BEHIND = "clock_behind"
    NOT_PUBLISHED = "not_published"
    DIGEST_REJECTED_BEFORE = "digest_rejected_before"
    ROLLBACK_REFUSED = "rollback_refused"
    # messages
    MESSAGE_MALFORMED = "message_malformed"
    UNSIGNED = "unsigned"
    SIGNATURE_INVALID = "signature_invalid"
    WRONG_AUDIENCE = "wrong_audience"
    STALE_GENERATION = "stale_generation"
    EXPIRED = "expired"
    UNKNOWN_COMMAND = "unknown_command"
    # transfer and storage
    REGISTRY_UNREACHABLE = "registry_unreachable"
    BLOB_MISSING = "blob_missing"
    OUTSIDE_WINDOW = "outside_window"
    METERED = "metered"
    BROKER_UNREACHABLE = "broker_unreachable"
    DUPLICATE_DEVICE = "duplicate_device"
    LINK_STALLED = "link_stalled"
    DISK_FULL = "disk_full"
    STORAGE_FAULT = "storage_fault"
    # the device
    RUNTIME_MISSING = "runtime_missing"
    DEVICE_UNFIT = "device_unfit"
    MEMORY_TOO_SMALL = "memory_too_small"
    # verdicts on a candidate
    LOAD_FAILED = "load_failed"
    CANDIDATE_CRASHED = "candidate_crashed"
    CANDIDATE_HUNG = "candidate_hung"
    GOLDEN_MISMATCH = "golden_mismatch"
    TOO_SLOW = "too_slow"
    MEMORY_EXCEEDED = "memory_exceeded"
    INTERFACE_CHANGED = "interface_changed"
    ERROR_RATE = "error_rate"
    LATENCY_REGRESSED = "latency_regressed"
    NON_FINITE_OUTPUT = "non_finite_output"
    OUTPUT_DRIFT = "output_drift"
    MEMORY_LEAK = "memory_leak"
    FAILED_STARTS = "failed_starts"
    OPERATOR_ROLLBACK = "operator_rollback"
    NO_PREVIOUS = "no_previous"
    # serving
    UNKNOWN_MODEL = "unknown_model"
    MODEL_NOT_READY = "model_not_ready"
    BAD_TENSOR = "bad_tensor"
    BODY_TOO_LARGE = "body_too_large"
    OVERLOADED = "overloaded"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    INFERENCE_FAILED = "inference_failed"
    NOT_ALLOWED = "not_allowed"
    NOT_FOUND = "not_found"
    SERVING_UNREACHABLE = "serving_unreachable"
    # success
    OK = "ok"


class EdgewardError(Exception):
    """Base of all expected failures.

    `what` names the culprit in one sentence; `next_step` says what the reader can do about it.
    """

    exit_code = 1

    def __init__(self, reason: Reason, what: str, next_step: str) -> None:
        super().__init__(what)
        self.reason = reason
        self.what = " ".join(what.split())
        self.next_step = " ".join(next_step.split())

    def __str__(self) -> str:
        return f"{self.what} [{self.reason.value}] → {self.next_step}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.what, self.next_step)


class InputRejected(EdgewardError):
    """What the user gave cannot be used; they correct it and run again."""

    exit_code = 2


class Refused(EdgewardError):
    """The work was done and its outcome is no: nothing fits the budget, a deployment failed."""

    exit_code = 3


class BundleRejected(EdgewardError):
    """The bundle is at fault: never retry this digest."""

    exit_code = 4


class TransferFailed(EdgewardError):
    """The network or the other end is at fault: retry later."""

    exit_code = 5


class DeviceUnfit(EdgewardError):
    """This device cannot do it: an operator has to act."""

    exit_code = 6


class StorageFault(EdgewardError):
    """Disk or filesystem: free space, repair or replace it."""

    exit_code = 7


class MessageRejected(EdgewardError):
    """A message is malformed, unsigned, misaddressed, stale or expired: it is ignored and reported."""

    exit_code = 8


class RequestRejected(EdgewardError):
    """An inference request is at fault or cannot be taken now; carries the HTTP status."""

    def __init__(
        self, status: int, reason: Reason, what: str, next_step: str, *, retry_after_s: int | None = None
    ) -> None:
        super().__init__(reason, what, next_step)
        self.status = status
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _request_rejected, (self.status, self.reason, self.what, self.next_step, self.retry_after_s)


def _request_rejected(
    status: int, reason: Reason, what: str, next_step: str, retry_after_s: int | None
) -> RequestRejected:
    return RequestRejected(status, reason, what, next_step, retry_after_s=retry_after_s)
