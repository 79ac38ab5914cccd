"""Errors carry a code, a culprit and a next step, and travel between processes."""

from __future__ import annotations

import pickle

import pytest

from edge_contract import errors
from edge_contract.errors import EdgewardError, Reason, RequestRejected

# Those of the contract; a program may have its own for its own use.
KINDS = [
    kind
    for kind in EdgewardError.__subclasses__()
    if kind.__module__ == errors.__name__ and kind is not RequestRejected
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_one_line_with_all_three_parts(kind: type[EdgewardError]) -> None:
    error = kind(Reason.DISK_FULL, "the disk\n  is full", "free\tspace")
    assert str(error) == "the disk is full [disk_full] → free space"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_a_process_boundary(kind: type[EdgewardError]) -> None:
    error = kind(Reason.DISK_FULL, "full", "free space")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.reason, copy.what, copy.next_step) == (error.reason, error.what, error.next_step)


def test_a_refused_request_survives_a_process_boundary() -> None:
    error = RequestRejected(429, Reason.OVERLOADED, "queue is full", "retry", retry_after_s=2)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.status, copy.reason, copy.retry_after_s) == (429, Reason.OVERLOADED, 2)


def test_exit_codes_tell_the_kinds_apart() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert min(codes) == 2


def test_reason_codes_are_lower_case_words_and_unique() -> None:
    values = [reason.value for reason in Reason]
    assert len(set(values)) == len(values)
    assert all(value == reason.name.lower() for value, reason in zip(values, Reason, strict=True))


def test_reason_codes_are_never_renamed() -> None:
    """The codes that have been on the wire. Add new ones below; none ever leaves this list."""
    published = {
        "bad_input unknown_profile bad_config model_unreadable model_unsupported data_mismatch",
        "data_too_small metric_failed nothing_fits manifest_invalid digest_mismatch trust_failed",
        "trust_expired not_published digest_rejected_before rollback_refused message_malformed unsigned",
        "signature_invalid wrong_audience stale_generation expired unknown_command registry_unreachable",
        "blob_missing broker_unreachable disk_full storage_fault runtime_missing device_unfit",
        "memory_too_small load_failed candidate_crashed candidate_hung golden_mismatch too_slow error_rate",
        "latency_regressed non_finite_output output_drift failed_starts operator_rollback no_previous",
        "unknown_model model_not_ready bad_tensor body_too_large overloaded deadline_exceeded",
        "inference_failed not_allowed not_found serving_unreachable ok",
    }
    assert {code for line in published for code in line.split()} <= {r.value for r in errors.Reason}
