"""What networks, proxies and web servers do to a download, against the real fetch child.

A fault either is over come within the child, or ends it with its own reason; then the next child completes.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.update.store import Store
from edge_contract.errors import BundleRejected, Reason, TransferFailed
from tests.faults.conftest import Cases
from tests.support.broker import free_port
from tests.support.certificates import Authority
from tests.support.http_registry import (
    Answer,
    FolderServer,
    cut,
    drip,
    endless,
    hang_up,
    redirect,
    span,
    stall,
    status,
    tagged,
    whole,
    whole_always,
    with_headers,
)
from tests.support.models import BundleOnDisk, make_bundle
from tests.support.proxy import Proxy
from tests.support.registry_folder import RegistryFolder
from tests.support.site import MakeSite
from tests.support.waiting import wait_for

PADDING = 400_000
PROXIES = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"), "")


class Made(NamedTuple):
    registry: RegistryFolder
    bundle: BundleOnDisk


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    bundle = make_bundle(tmp_path_factory.mktemp("bundle"), padding_bytes=PADDING)
    registry = RegistryFolder.create(tmp_path_factory.mktemp("registry"))
    registry.publish(bundle)
    return Made(registry, bundle)


class Ended(NamedTuple):
    code: int
    last: dict[str, Any]


@dataclass
class Box:
    """A device's configuration and its registry's server; `fetch` is the real child."""

    folder: Path
    made: Made
    server: FolderServer
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The large blob's, as the server sees it."""
        file = self.made.registry.blob(self.made.bundle, "labels")
        return str(file.relative_to(self.made.registry.folder))

    @property
    def body(self) -> bytes:
        """The large blob."""
        return self.made.registry.blob(self.made.bundle, "labels").read_bytes()

    @property
    def ranges(self) -> list[str | None]:
        """What was asked of the large blob."""
        return [seen.range for seen in self.server.seen if seen.path == f"/{self.path}"]

    @property
    def part(self) -> Path:
        """Where it grows."""
        return self.folder / "state" / "staging" / f"{Path(self.path).name}.part"

    def answer(self, *script: Answer) -> None:
        """The large blob's answers, one a request, then the right one."""
        rest = list(script)

        def answer(request: Any) -> None:
            (rest.pop(0) if rest else whole(self.body))(request)

        self.server.instead[self.path] = answer

    def start(self) -> subprocess.Popen[str]:
        """The child."""
        registry = {"url": self.server.url, "root": str(self.made.registry.root)}
        registry |= {"timeout_s": 1.0, "retries": 3} | self.settings
        lines = [f"{key} = {json.dumps(value)}" for key, value in registry.items()]
        config = self.folder / "agent.toml"
        top = f'tenant = "t"\ndevice = "d"\nstate_dir = "{self.folder}/state"\n'
        top += f'run_dir = "{self.folder}/run"\n'
        config.write_text(top + "[registry]\n" + "\n".join(lines) + "\n[update]\ndisk_reserve_bytes = 0\n")
        bundle = self.made.bundle
        names = [bundle.manifest.name, bundle.manifest.version, bundle.digest]
        return subprocess.Popen(
            [sys.executable, "-m", "edge_agent", "fetch", "--config", str(config), *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | PROXIES | self.environment,
        )

    def fetch(self) -> Ended:
        """Run the child to its end. It never leaves a traceback, nor anything in the store but the whole."""
        child = self.start()
        out, err = child.communicate(timeout=60)
        assert "Traceback" not in err
        ended = Ended(child.returncode, json.loads(out.splitlines()[-1]))
        assert self.stored == (ended.code == 0)
        return ended

    @property
    def stored(self) -> bool:
        """Whether the version is whole in the store."""
        layout = Layout(Config("t", "d", state_dir=f"{self.folder}/state"))
        return layout.store.exists() and Store(layout).has(self.made.bundle.digest)

    def assert_recovers(self) -> None:
        """With everything as it should be, the next child completes."""
        self.server.instead.clear()
        assert self.fetch() == (0, {"event": "done"})


@pytest.fixture
def box(made: Made, tmp_path: Path) -> Iterator[Box]:
    with FolderServer(made.registry.folder) as server:
        yield Box(tmp_path, made, server)


def compressed(body: bytes) -> Answer:
    """As some proxies answer whoever asks for no compression."""
    return with_headers(whole_always(gzip.compress(body)), Content_Encoding="gzip")


def flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


# Each starts a process of Python at least once: these few are left to `make faults`.
_LATER = frozenset(
    {
        "a Content-Range of another length",
        "another entity tag after the cut",
        "a damaged copy in a cache",
        "a storm of 500",
        "hangs up, says nothing",
        "404",
        "401",
        "altered for good",
        "of an unknown authority",
    }
)


def split(faults: Iterable[str]) -> list[Any]:
    """The faults as parameters, some of them marked thorough."""
    return [pytest.param(f, marks=pytest.mark.thorough if f in _LATER else ()) for f in faults]


Script = Callable[[bytes], list[Answer]]
OVERCOME: dict[str, tuple[Script, dict[str, Any]]] = {
    "cut in the middle": (lambda b: [cut(b, 100_000), cut(b, 100_000)], {}),
    "hangs up, says nothing": (lambda b: [hang_up, stall(1.5)], {}),
    "another entity tag after the cut": (
        lambda b: [tagged(cut(b, 100_000), '"a"'), tagged(whole(flipped(b)), '"b"')],
        {},
    ),
    "200 instead of 206": (lambda b: [cut(b, 100_000), whole_always(b)], {}),
    "a wrong Content-Range": (lambda b: [cut(b, 100_000), span(b, 7)], {}),
    "a Content-Range of another length": (lambda b: [cut(b, 100_000), span(b, 100_000, total=1)], {}),
    "too little, and says so": (lambda b: [whole(b[:1000]), whole_always(b[:-1])], {}),
    "too slow": (lambda b: [drip(b, 50)], {"low_speed_bytes_per_s": 1000, "low_speed_s": 0.5}),
    "a storm of 500": (lambda b: [status(500), status(503)], {}),
    "429 with Retry-After": (lambda b: [status(429, Retry_After="1")], {}),
    "a compressed body": (lambda b: [compressed(b)], {}),
    "a damaged copy in a cache": (lambda b: [whole(flipped(b))], {}),
}


@pytest.mark.parametrize("fault", split(OVERCOME))
def test_the_child_overcomes(box: Box, cases: Cases, fault: str) -> None:
    script, settings = OVERCOME[fault]
    answers = script(box.body)
    box.settings = settings
    box.answer(*answers)
    assert box.fetch().code == 0
    cases.add("download of a blob", fault)
    assert len(box.ranges) == len(answers) + (fault != "200 instead of 206")


ENDS: dict[str, tuple[Script, int, Reason, str]] = {
    "too much": (
        lambda _: [endless(b"")] * 3,
        TransferFailed.exit_code,
        Reason.DIGEST_MISMATCH,
        "sends more",
    ),
    "a redirect to elsewhere": (
        lambda b: [redirect("http://login.example/?next=x")] * 3,
        TransferFailed.exit_code,
        Reason.REGISTRY_UNREACHABLE,
        "redirects to http://login.example/, which is not followed",
    ),
    "500 without end": (
        lambda b: [status(500)] * 3,
        TransferFailed.exit_code,
        Reason.REGISTRY_UNREACHABLE,
        "answered 500",
    ),
    "404": (lambda b: [status(404)], TransferFailed.exit_code, Reason.BLOB_MISSING, "answered 404"),
    "401": (lambda b: [status(401)], TransferFailed.exit_code, Reason.NOT_ALLOWED, "answered 401"),
    "429 for an hour": (
        lambda b: [status(429, Retry_After="3600")],
        TransferFailed.exit_code,
        Reason.REGISTRY_UNREACHABLE,
        "answered 429",
    ),
    "altered for good": (
        lambda b: [whole(flipped(b))] * 2,
        BundleRejected.exit_code,
        Reason.DIGEST_MISMATCH,
        "signed metadata says",
    ),
}


@pytest.mark.parametrize("fault", split(ENDS))
def test_the_child_ends_with_the_reason_and_the_next_completes(box: Box, cases: Cases, fault: str) -> None:
    script, code, reason, text = ENDS[fault]
    box.answer(*script(box.body))
    ended = box.fetch()
    assert (ended.code, ended.last["reason"]) == (code, reason.value), ended
    assert text in ended.last["what"]
    cases.add("download of a blob", fault)
    assert ended.last.get("retry_after_s") == (3600.0 if "hour" in fault else None)
    box.assert_recovers()


def test_redirects_in_a_circle_end(box: Box, cases: Cases) -> None:
    box.settings = {"retries": 1}
    box.answer(*[redirect(f"/{box.path}")] * 6)
    ended = box.fetch()
    assert "more than 5 redirects" in ended.last["what"]
    assert len(box.ranges) == 6
    cases.add("download of a blob", "a redirect loop")
    box.assert_recovers()


def test_a_registry_that_dies_in_the_middle(box: Box, cases: Cases) -> None:
    box.server.rate_bytes_per_s = 200_000
    child = box.start()
    wait_for(lambda: box.part.exists() and box.part.stat().st_size > 50_000, "the first bytes")
    box.server.die()
    out, _ = child.communicate(timeout=60)
    ended = json.loads(out.splitlines()[-1])
    assert (child.returncode, ended["reason"]) == (TransferFailed.exit_code, "registry_unreachable")
    cases.add("download of a blob", "the registry dies")
    assert box.fetch().last["reason"] == "registry_unreachable"
    cases.add("refresh of metadata", "connection refused")
    box.server.rate_bytes_per_s = 0
    box.server.seen.clear()
    box.server.start()
    box.assert_recovers()
    assert box.ranges[0] is not None


def test_a_child_that_is_killed_loses_what_was_on_its_way_only(box: Box, cases: Cases) -> None:
    box.server.rate_bytes_per_s = 200_000
    child = box.start()
    wait_for(lambda: box.part.exists() and box.part.stat().st_size > 100_000, "the first bytes")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    cases.add("download of a blob", "kill -9")
    have = box.part.stat().st_size
    assert box.part.stat().st_blocks * 512 >= PADDING  # the rest of its room is still reserved
    box.server.rate_bytes_per_s = 0
    box.server.seen.clear()
    box.assert_recovers()
    assert box.ranges == [f"bytes={have}-"]


@pytest.mark.parametrize("point", ["refresh of metadata", "download of a blob"])
def test_a_login_page_in_place_of_everything(box: Box, cases: Cases, point: str) -> None:
    page = whole_always(b"<html>Welcome to the airport. Please log in.</html>")
    box.server.instead["metadata/timestamp.json" if point == "refresh of metadata" else box.path] = page
    ended = box.fetch()
    assert ended.code == TransferFailed.exit_code
    cases.add(point, "a login page")
    box.assert_recovers()


def test_names_that_are_gone(box: Box, cases: Cases) -> None:
    # No name under this one exists (RFC 6761), so no resolver is needed to say so.
    box.settings = {"url": f"http://registry.invalid:{free_port()}", "retries": 1}
    ended = box.fetch()
    assert (ended.code, ended.last["reason"]) == (TransferFailed.exit_code, "registry_unreachable")
    assert "the host's name cannot be resolved" in ended.last["what"]
    cases.add("refresh of metadata", "DNS gone")
    box.settings = {}
    box.assert_recovers()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


CERTIFICATES = {
    "expired": ("127.0.0.1", -1, "its TLS certificate has expired"),
    "of another host": ("elsewhere.example", 30, "its TLS certificate is another host's"),
    "of an unknown authority": ("127.0.0.1", 30, "its TLS certificate is from an unknown authority"),
}


@pytest.mark.parametrize("fault", split(CERTIFICATES))
def test_certificates(box: Box, cases: Cases, authority: Authority, fault: str) -> None:
    host, days, text = CERTIFICATES[fault]
    box.server.stop()
    box.server.tls = authority.issue(host, days=days)
    box.server.start()
    box.settings = {"retries": 1}
    if "unknown" not in fault:
        box.settings["tls_ca"] = str(authority.path)
    ended = box.fetch()
    assert (ended.code, ended.last["reason"]) == (TransferFailed.exit_code, "registry_unreachable")
    assert text in ended.last["what"]
    cases.add("TLS handshake", fault)
    box.server.stop()
    box.server.tls = authority.issue("127.0.0.1")
    box.server.start()
    box.settings["tls_ca"] = str(authority.path)
    box.assert_recovers()


def test_proxies(box: Box, cases: Cases, authority: Authority) -> None:
    box.settings = {"retries": 1}
    nobody = f"http://127.0.0.1:{free_port()}"
    box.environment = {"HTTP_PROXY": nobody}
    ended = box.fetch()
    assert ended.code == TransferFailed.exit_code
    assert f"through the proxy {nobody}: the proxy failed: connection refused" in ended.last["what"]
    cases.add("proxy", "connection refused")
    with Proxy(login="me:secret") as proxy:
        box.environment = {"HTTP_PROXY": proxy.url}
        ended = box.fetch()
        assert "answered 407" in ended.last["what"]
        cases.add("proxy", "asks for a login")
        box.environment = {"HTTP_PROXY": proxy.url.replace("//", "//me:wrong@")}
        ended = box.fetch()
        assert "answered 407" in ended.last["what"]
        assert "wrong" not in json.dumps(ended.last)
        box.environment = {"HTTP_PROXY": proxy.url.replace("//", "//me:secret@"), "NO_PROXY": "127.0.0.1"}
        proxy.asked.clear()
        box.server.instead[box.path] = status(404)
        assert box.fetch().last["reason"] == "blob_missing"
        assert proxy.asked == []  # NO_PROXY
        del box.environment["NO_PROXY"]
        box.assert_recovers()
        assert any(url.endswith(box.path) for url in proxy.asked)


@pytest.mark.thorough
def test_tls_through_a_proxy(box: Box, cases: Cases, authority: Authority) -> None:
    box.server.stop()
    box.server.tls = authority.issue("127.0.0.1")
    box.server.start()
    box.settings = {"retries": 1, "tls_ca": str(authority.path)}
    with Proxy(login="me:secret") as proxy:
        box.environment = {"HTTPS_PROXY": proxy.url}
        assert box.fetch().code == TransferFailed.exit_code
        cases.add("proxy", "refuses a tunnel")
        box.environment = {"HTTPS_PROXY": proxy.url.replace("//", "//me:secret@")}
        box.assert_recovers()
        assert set(proxy.asked) == {box.server.url.removeprefix("https://")}


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(8))
def test_a_bad_day(box: Box, cases: Cases, seed: int) -> None:
    """Fault after fault at random, on metadata and blobs; the version arrives all the same."""
    chance = random.Random(seed)
    names = [name for name in OVERCOME if name not in ("too slow", "429 with Retry-After")]

    def answer(request: Any) -> None:
        file = box.server.folder / request.path.lstrip("/")
        if not file.is_file():
            status(404)(request)
            return
        body = file.read_bytes()
        bad = chance.choice(OVERCOME[chance.choice(names)][0](body)) if chance.random() < 0.4 else None
        (bad or whole(body))(request)

    class Everything(dict[str, Answer]):
        def __contains__(self, key: object) -> bool:
            return True

        def __getitem__(self, key: str) -> Answer:
            return answer

    box.server.instead = Everything()
    deadline_s = time.monotonic() + 100
    codes: list[int] = []
    while (ended := box.fetch()).code != 0:
        codes.append(ended.code)
        assert time.monotonic() < deadline_s, codes
    cases.add("a whole update", f"random faults, seed {seed}")
    assert box.stored


@pytest.mark.thorough
def test_no_interruption_ever_ends_a_generation(make_site: MakeSite, cases: Cases) -> None:
    """The real agent, and a registry that goes away far more often than it has attempts."""
    site = make_site(update={"retry_s": 0.2, "max_attempts": 2})
    name = "patient"
    site.install(site.publish(name, 1))
    v2 = site.publish(name, 2, padding_bytes=3_000_000)
    site.server.rate_bytes_per_s = 1_000_000
    site.desire(v2)
    for _ in range(8):
        site.wait_state(name, "downloading", "idle")
        time.sleep(0.3)
        site.server.die()
        site.wait_state(name, "waiting", "idle")
        site.server.start()
        cases.add("a whole update", "the registry dies")
    assert site.operator.wait_settled(name, 60).outcome == "committed"
