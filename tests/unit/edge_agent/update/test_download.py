"""The downloader against a real HTTP server that cuts, lies, refuses and recovers."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edge_agent.config import Registry
from edge_agent.update.download import BlobMissing, Downloader
from edge_contract.errors import BundleRejected, EdgewardError, Reason, StorageFault, TransferFailed
from tests.support.broker import free_port
from tests.support.http_registry import (
    Answer,
    ScriptedServer,
    cut,
    drip_head,
    endless,
    hang_up,
    span,
    stall,
    status,
    tagged,
    whole,
    whole_always,
)
from tests.support.small_disk import small_disk

BODY = random.Random(1).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()
WRONG = bytes([BODY[0] ^ 1]) + BODY[1:]
PATH = f"blobs/sha256/{SHA[:2]}/{SHA}"
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Outcome(NamedTuple):
    path: Path | None
    error: EdgewardError | None
    server: ScriptedServer
    counted: int


Fetch = Callable[..., Outcome]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The bounds of each pause between attempts; none is slept."""
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.0

    monkeypatch.setattr(random, "uniform", uniform)
    return bounds


@pytest.fixture
def fetch(tmp_path: Path, pauses: list[tuple[float, float]]) -> Fetch:
    """Fetch BODY from a server with this script. However it ends, no wrong file has the right name."""

    def run(*script: Answer, retries: int = 3, body: bytes = BODY, rate: int = 0) -> Outcome:
        sha256 = hashlib.sha256(body).hexdigest()
        counts: list[int] = []
        with ScriptedServer(*script) as server:
            registry = Registry(
                url=server.url + "/", timeout_s=0.5, retries=retries, max_rate_bytes_per_s=rate
            )
            downloader = Downloader(registry, tmp_path, counts.append)
            try:
                path, error = downloader.fetch(f"blobs/{sha256}", sha256, len(body)), None
            except EdgewardError as e:
                path, error = None, e
        assert all(seen.path == f"/blobs/{sha256}" for seen in server.seen)
        final = tmp_path / sha256
        assert final.exists() == (path is not None)
        if path is not None:
            assert path == final
            assert path.read_bytes() == body
            assert not part(tmp_path, sha256).exists()
        return Outcome(path, error, server, sum(counts))

    return run


def part(folder: Path, sha256: str = SHA) -> Path:
    return folder / f"{sha256}.part"


def ranges(outcome: Outcome) -> list[str | None]:
    return [seen.range for seen in outcome.server.seen]


def offset(range_: str | None) -> int:
    return int(range_.removeprefix("bytes=").removesuffix("-")) if range_ else 0


# it arrives


def test_a_blob_arrives_whole(fetch: Fetch) -> None:
    outcome = fetch(whole(BODY))
    assert outcome.error is None
    assert (ranges(outcome), outcome.counted) == ([None], len(BODY))


def test_an_empty_blob_needs_no_request(fetch: Fetch) -> None:
    outcome = fetch(status(500), body=b"")
    assert outcome.error is None
    assert outcome.server.seen == []


def test_what_is_staged_already_is_not_fetched_again(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / SHA).write_bytes(BODY)
    assert fetch(status(500)).server.seen == []


def test_a_damaged_staged_file_is_fetched_again(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / SHA).write_bytes(WRONG)
    assert fetch(whole(BODY)).error is None


def test_it_resumes_where_the_connection_was_cut(fetch: Fetch) -> None:
    outcome = fetch(cut(BODY, 100_000), cut(BODY, 50_000), whole(BODY))
    assert outcome.error is None
    first, second, third = (offset(seen.range) for seen in outcome.server.seen)
    assert first == 0
    assert 80_000 < second <= 100_000
    assert second + 30_000 < third <= second + 50_000
    assert outcome.counted == len(BODY)  # nothing came twice


def test_it_resumes_what_an_earlier_process_left(fetch: Fetch, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(BODY[:70_000])
    assert ranges(fetch(whole(BODY))) == ["bytes=70000-"]


def test_a_part_that_is_complete_is_only_verified(fetch: Fetch, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(BODY)
    assert ranges(fetch(status(500))) == []


@pytest.mark.parametrize("left", [BODY + b"x", BODY * 2])
def test_a_part_longer_than_the_blob_is_begun_anew(fetch: Fetch, tmp_path: Path, left: bytes) -> None:
    part(tmp_path).write_bytes(left)
    assert ranges(fetch(whole(BODY))) == [None]


def test_a_server_without_ranges_sends_everything_again(fetch: Fetch, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(WRONG[:70_000])  # not even looked at
    outcome = fetch(whole_always(BODY))
    assert outcome.error is None
    assert ranges(outcome) == ["bytes=70000-"]


def test_a_part_damaged_by_a_power_cut_does_not_condemn_the_bundle(fetch: Fetch, tmp_path: Path) -> None:
    """What was never synced may be anything: the blob is fetched again from the start."""
    part(tmp_path).write_bytes(bytes(1000) + BODY[1000:70_000])
    outcome = fetch(whole(BODY))
    assert outcome.error is None
    assert ranges(outcome) == ["bytes=70000-", None]


def test_a_range_that_was_not_asked_for_is_refused_and_the_whole_asked_for(
    fetch: Fetch, tmp_path: Path
) -> None:
    part(tmp_path).write_bytes(BODY[:70_000])
    outcome = fetch(span(BODY, 0), whole(BODY))
    assert outcome.error is None
    assert ranges(outcome) == ["bytes=70000-", None]
    assert outcome.counted == len(BODY) - 70_000  # what was here counts only while it is used


def test_a_login_page_does_not_cost_what_is_here_already(fetch: Fetch, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(BODY[:70_000])
    outcome = fetch(whole_always(b"<html>please log in"), retries=2)
    assert isinstance(outcome.error, TransferFailed)
    assert part(tmp_path).read_bytes() == BODY[:70_000]
    assert ranges(fetch(whole(BODY))) == ["bytes=70000-"]


def test_zeros_at_the_end_of_a_part_are_not_believed(fetch: Fetch, tmp_path: Path) -> None:
    """So does an end look that had not reached the disk before a power cut."""
    part(tmp_path).write_bytes(BODY[: 2 << 16] + bytes(100_000))
    outcome = fetch(whole(BODY))
    assert outcome.error is None
    assert ranges(outcome) == [f"bytes={2 << 16}-"]


def test_zeros_that_belong_to_the_blob_arrive(fetch: Fetch, tmp_path: Path) -> None:
    body = BODY[: 1 << 16] + bytes(1 << 17)
    part(tmp_path, hashlib.sha256(body).hexdigest()).write_bytes(body)
    assert fetch(status(500), body=body).server.seen == []
    body = bytes(1 << 17) + BODY[: 1 << 16]
    part(tmp_path, hashlib.sha256(body).hexdigest()).write_bytes(body[: 3 << 16 >> 1])
    assert fetch(whole(body), body=body).error is None


def test_another_entity_tag_for_the_same_digest_costs_nothing(fetch: Fetch) -> None:
    """Several servers behind one name date their copies differently, and date is what many tags are."""
    first, other = tagged(cut(BODY, 100_000), '"a"'), tagged(whole(BODY), '"b"')
    outcome = fetch(first, tagged(whole_always(BODY), '"b"'), other)
    assert outcome.error is None
    tags = [(seen.range is not None, seen.if_range) for seen in outcome.server.seen]
    assert tags == [(False, None), (True, '"a"'), (True, None)]
    assert outcome.counted == len(BODY)


def test_a_rest_under_another_entity_tag_is_not_taken(fetch: Fetch) -> None:
    outcome = fetch(tagged(cut(BODY, 100_000), '"a"'), tagged(whole(WRONG), '"b"'), whole(BODY))
    assert outcome.error is None
    assert ranges(outcome)[2] is None


# it recovers


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_statuses_that_mean_later_are_tried_again(fetch: Fetch, code: int) -> None:
    outcome = fetch(status(code), whole(BODY))
    assert outcome.error is None
    assert len(outcome.server.seen) == 2


@pytest.mark.parametrize("trouble", [hang_up, stall(0.8), cut(BODY, 0)], ids=["hang up", "stall", "cut"])
def test_network_trouble_is_tried_again(fetch: Fetch, trouble: Answer) -> None:
    assert fetch(trouble, whole(BODY)).error is None


def test_attempts_are_bounded_and_their_pauses_have_full_jitter(
    fetch: Fetch, pauses: list[tuple[float, float]]
) -> None:
    outcome = fetch(status(503), retries=8)
    assert isinstance(outcome.error, TransferFailed)
    assert outcome.error.reason is Reason.REGISTRY_UNREACHABLE
    assert "answered 503" in outcome.error.what
    assert len(outcome.server.seen) == 8
    assert pauses == [(0, 1.0), (0, 2.0), (0, 4.0), (0, 8.0), (0, 16.0), (0, 30.0), (0, 30.0)]


def test_nobody_listens(tmp_path: Path, pauses: list[tuple[float, float]]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    downloader = Downloader(Registry(url=url, timeout_s=0.5, retries=2), tmp_path, lambda _: None)
    with pytest.raises(TransferFailed, match=url) as fault:
        downloader.fetch(PATH, SHA, len(BODY))
    assert fault.value.reason is Reason.REGISTRY_UNREACHABLE
    assert len(pauses) == 1


def test_a_link_that_gets_on_is_never_given_up(fetch: Fetch, pauses: list[tuple[float, float]]) -> None:
    outcome = fetch(*[cut(BODY, 20_000)] * 30, retries=2)
    assert outcome.error is None
    assert len(outcome.server.seen) == 15
    assert set(pauses) == {(0, 1.0)}


def test_a_server_without_ranges_that_cuts_at_the_same_place_is_given_up(fetch: Fetch) -> None:
    """Bytes that came before are no progress."""

    def answer(request: Any) -> None:
        request.head(200, len(BODY))
        request.wfile.write(BODY[:100_000])
        request.cut_off()

    outcome = fetch(answer, retries=3)
    assert isinstance(outcome.error, TransferFailed)
    assert len(outcome.server.seen) == 4 - 1


def test_what_came_before_the_last_failure_stays_for_the_next_time(fetch: Fetch, tmp_path: Path) -> None:
    outcome = fetch(cut(BODY, 100_000), status(503), retries=2)
    assert isinstance(outcome.error, TransferFailed)
    left = part(tmp_path).read_bytes()
    assert 0 < len(left) <= 100_000
    assert BODY.startswith(left)
    assert fetch(whole(BODY)).error is None


def test_a_body_that_is_shorter_than_signed_metadata_says(fetch: Fetch) -> None:
    outcome = fetch(whole(BODY[:1000]), status(503), retries=2)
    assert isinstance(outcome.error, TransferFailed)
    outcome = fetch(whole(BODY[:1000]), retries=1)
    assert outcome.error is not None


# it refuses


@pytest.mark.parametrize("code", [204, 400, 401, 403, 404, 407, 410, 416])
def test_other_refusals_are_final_for_this_attempt(fetch: Fetch, code: int) -> None:
    outcome = fetch(status(code), whole(BODY))
    assert isinstance(outcome.error, BlobMissing)
    entry = code in (401, 403, 407)
    assert outcome.error.reason is (Reason.NOT_ALLOWED if entry else Reason.BLOB_MISSING)
    assert outcome.error.exit_code == TransferFailed.exit_code  # the device tries again later
    assert f"answered {code}" in outcome.error.what
    assert len(outcome.server.seen) == 1


def test_wrong_bytes_are_asked_for_once_more_past_all_caches(fetch: Fetch) -> None:
    outcome = fetch(whole(WRONG), whole(BODY))
    assert outcome.error is None
    assert [seen.cache_control for seen in outcome.server.seen] == [None, "no-cache"]


def test_wrong_bytes_are_refused_and_thrown_away(fetch: Fetch, tmp_path: Path) -> None:
    outcome = fetch(whole(WRONG))
    assert isinstance(outcome.error, BundleRejected)
    assert outcome.error.reason is Reason.DIGEST_MISMATCH
    assert SHA[:12] in outcome.error.what
    assert part(tmp_path).stat().st_size == 0
    assert len(outcome.server.seen) == 2
    assert outcome.counted == 0


def test_wrong_bytes_in_the_second_half_are_blamed_on_the_server_in_the_end(fetch: Fetch) -> None:
    tampered = BODY[:-1] + bytes([BODY[-1] ^ 1])
    outcome = fetch(cut(tampered, 100_000), whole(tampered))
    assert isinstance(outcome.error, BundleRejected)
    assert ranges(outcome)[-1] is None  # it had the whole body once more, in one piece


def test_what_follows_the_right_bytes_is_never_kept(fetch: Fetch, tmp_path: Path) -> None:
    """Where the last right byte ends a piece, the digest finds them whole and they will do."""
    outcome = fetch(endless(BODY), retries=2)
    if outcome.error is None:
        assert outcome.path.read_bytes() == BODY
    else:
        assert outcome.error.reason is Reason.DIGEST_MISMATCH
        assert part(tmp_path).stat().st_size <= len(BODY)
    assert fetch(whole(BODY)).error is None


@pytest.mark.parametrize("answer", [whole(BODY + b"x"), endless(b"")])
def test_more_than_signed_metadata_allows_is_refused_while_it_comes(
    fetch: Fetch, tmp_path: Path, answer: Answer
) -> None:
    """No verdict on the bundle: a login page of the network may be longer than the blob, too."""
    outcome = fetch(answer, retries=2)
    assert isinstance(outcome.error, TransferFailed)
    assert outcome.error.reason is Reason.DIGEST_MISMATCH
    assert part(tmp_path).stat().st_size <= len(BODY)
    assert len(outcome.server.seen) == 2
    assert fetch(whole(BODY)).error is None


def test_a_full_disk_is_not_the_registrys_fault(pauses: list[tuple[float, float]], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 128 << 10) as disk, ScriptedServer(whole(BODY)) as server:
        registry = Registry(url=server.url, timeout_s=0.5, retries=3)
        downloader = Downloader(registry, disk.folder, lambda _: None)
        with pytest.raises(StorageFault) as fault:
            downloader.fetch(PATH, SHA, len(BODY))
        assert fault.value.reason is disk.reason
        assert server.seen == []  # there is no room for the last byte, so the first is not asked for
        assert not (disk.folder / SHA).exists()


# it takes its time


def test_the_rate_limit_is_kept(fetch: Fetch) -> None:
    begun_s = time.monotonic()
    outcome = fetch(whole(BODY), rate=600_000)
    assert outcome.error is None
    assert time.monotonic() - begun_s >= 0.9 * len(BODY) / 600_000


def test_a_connection_is_kept_for_the_next_blob_only_when_its_body_was_read(tmp_path: Path) -> None:
    """An unread refusal must not be taken for the beginning of the next answer."""
    other = BODY[::-1]
    sha = hashlib.sha256(other).hexdigest()
    with ScriptedServer(status(404), whole(BODY), whole(other)) as server:
        downloader = Downloader(Registry(url=server.url, timeout_s=0.5), tmp_path, lambda _: None)
        with pytest.raises(BlobMissing):
            downloader.fetch(PATH, SHA, len(BODY))
        assert downloader.fetch(PATH, SHA, len(BODY)).read_bytes() == BODY
        assert downloader.fetch(sha, sha, len(other)).read_bytes() == other


# it drips


@pytest.mark.parametrize("begun", [b"HTTP/1.1 200 OK\r\nX-Long: ", b"HTTP/1.1 2", CHUNKED_HEAD + b"5;"])
def test_lines_that_drip_are_given_up(
    tmp_path: Path, pauses: list[tuple[float, float]], begun: bytes
) -> None:
    """Each byte comes within `timeout_s`: status line, headers, or the length of a chunk."""
    with ScriptedServer(drip_head(0.05, begun)) as server:
        registry = Registry(url=server.url, timeout_s=0.4, low_speed_s=0.2, retries=2)
        with pytest.raises(TransferFailed) as error:
            Downloader(registry, tmp_path, lambda _: None).fetch(PATH, SHA, len(BODY))
        assert len(server.seen) == 2
    assert (error.value.reason, "too slowly" in error.value.what) == (Reason.REGISTRY_UNREACHABLE, True)


def test_a_head_that_drips_ends_with_the_deadline(tmp_path: Path, pauses: list[tuple[float, float]]) -> None:
    with ScriptedServer(drip_head(0.05)) as server:
        registry = Registry(url=server.url, timeout_s=60.0, deadline_s=0.5)
        with pytest.raises(TransferFailed) as error:
            Downloader(registry, tmp_path, lambda _: None).fetch(PATH, SHA, len(BODY))
    assert error.value.reason is Reason.DEADLINE_EXCEEDED


def test_a_head_that_drips_once_is_overcome(tmp_path: Path, pauses: list[tuple[float, float]]) -> None:
    with ScriptedServer(drip_head(0.05), whole(BODY)) as server:
        registry = Registry(url=server.url, timeout_s=0.4, low_speed_s=0.2, retries=2)
        done = Downloader(registry, tmp_path, lambda _: None).fetch(PATH, SHA, len(BODY))
        assert done.read_bytes() == BODY


def test_a_kept_connection_is_watched_as_well(tmp_path: Path, pauses: list[tuple[float, float]]) -> None:
    other = b"other"
    sha256 = hashlib.sha256(other).hexdigest()
    with ScriptedServer(whole(BODY), drip_head(0.05), whole(other)) as server:
        registry = Registry(url=server.url, timeout_s=0.4, low_speed_s=0.2, retries=2)
        downloader = Downloader(registry, tmp_path, lambda _: None)
        downloader.fetch(PATH, SHA, len(BODY))
        assert downloader.fetch(f"blobs/{sha256}", sha256, len(other)).read_bytes() == other


def test_a_long_pause_of_our_own_is_not_the_registrys(tmp_path: Path) -> None:
    with ScriptedServer(whole(BODY)) as server:
        registry = Registry(
            url=server.url, timeout_s=0.1, low_speed_s=0.1, max_rate_bytes_per_s=400_000, retries=1
        )
        done = Downloader(registry, tmp_path, lambda _: None).fetch(PATH, SHA, len(BODY))
    assert done.read_bytes() == BODY
