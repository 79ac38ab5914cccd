"""`edge-fleet registry serve`, the real process, and python-tuf's own client against it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
from click.testing import Result
from tuf.ngclient import Updater

from edge_contract.manifest import blob_path
from tests.support.registry_folder import RegistryFolder
from tests.unit.fleet import samples

Headers = dict[str, str]


class Server:
    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-c", "from fleet.cli import main; main()", "registry", "serve"]
        self.process = subprocess.Popen(
            [*command, str(folder), "--port", "0", "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url: str = json.loads(self.process.stdout.readline())["url"]
        self.port = int(self.url.rpartition(":")[2])

    def ask(
        self, path: str, method: str = "GET", headers: Headers | None = None
    ) -> tuple[int, Headers, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(method, path, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=10)
        return self.process.returncode, out, err


@pytest.fixture
def server(published: Path) -> Iterator[Server]:
    running = Server(published)
    yield running
    code, out, err = running.end()
    assert (code, out, err) == (0, "", "")


@pytest.fixture
def blob(published: Path, tmp_path: Path, run: Callable[..., Result]) -> tuple[str, bytes]:
    """Path and bytes of a published blob of some size."""
    data = bytes(range(256)) * 2000
    made = samples.bundle(tmp_path / "big", weights=data, version="3.0.0", release=3)
    run("registry", "publish", published, tmp_path / "big")
    return "/" + blob_path(made.files[0].sha256), data


def test_blobs_with_range_if_range_etag_and_head(server: Server, blob: tuple[str, bytes]) -> None:
    path, data = blob
    etag = f'"{path[-64:]}"'
    status, headers, body = server.ask(path)
    assert (status, body, headers["etag"]) == (200, data, etag)
    assert headers["accept-ranges"] == "bytes"
    assert "immutable" in headers["cache-control"]

    status, headers, body = server.ask(path, "HEAD")
    assert (status, body, headers["content-length"]) == (200, b"", str(len(data)))

    resume = {"Range": "bytes=1000-", "If-Range": etag}
    status, headers, body = server.ask(path, headers=resume)
    assert (status, body, headers["etag"]) == (206, data[1000:], etag)
    assert headers["content-range"] == f"bytes 1000-{len(data) - 1}/{len(data)}"

    status, _, body = server.ask(path, headers={"Range": "bytes=5-9"})
    assert (status, body) == (206, data[5:10])
    status, _, body = server.ask(path, headers={"Range": "bytes=-7"})
    assert (status, body) == (206, data[-7:])
    status, headers, _ = server.ask(path, headers={"Range": f"bytes={len(data)}-"})
    assert (status, headers["content-range"]) == (416, f"bytes */{len(data)}")
    # Another version of the file: the whole of it, not a part of something else.
    status, _, body = server.ask(path, headers={"Range": "bytes=5-9", "If-Range": '"other"'})
    assert (status, body) == (200, data)
    status, _, body = server.ask(path, headers={"If-None-Match": etag})
    assert (status, body) == (304, b"")


def test_metadata_is_fresh_and_revalidated(
    server: Server, published: Path, run: Callable[..., Result]
) -> None:
    status, headers, body = server.ask("/metadata/timestamp.json")
    assert (status, headers["cache-control"]) == (200, "no-cache")
    assert body == (published / "metadata" / "timestamp.json").read_bytes()
    again = {"If-None-Match": headers["etag"]}
    assert server.ask("/metadata/timestamp.json", headers=again)[0] == 304
    run("registry", "refresh", published)
    status, _, newer = server.ask("/metadata/timestamp.json", headers=again)
    assert status == 200
    assert newer != body
    assert server.ask("/metadata/1.root.json", "HEAD")[2] == b""
    assert server.ask("/root.json")[2] == (published / "root.json").read_bytes()


# Not one of these is a name of the registry's form.
FOREIGN = [
    "/",
    "/metadata",
    "/metadata/",
    "/metadata/99.root.json",
    "/metadata/.timestamp.json.part",
    "/metadata/../../keys/root.pem",
    "/../keys/operator.pem",
    "/%2e%2e/keys/operator.pem",
    "/blobs/sha256/../../../keys/operator.pem",
    "/blobs/sha256/%2e%2e/%2e%2e/%2e%2e/keys/operator.pem",
    "/blobs/sha256/00/" + "0" * 64,
    "/blobs/sha256/aa/" + "0" * 64,
    "//etc/passwd",
    "/metadata/timestamp.json%00",
    "/keys/root.pem",
    "/notes.txt",
    "/pending/fashion@9/manifest.json",
    "/metadata/1.models.2-0.jsonx",
    "/metadata/1.team-..%2f..%2fkeys.json",
]


def test_teams_and_bins_are_served(
    server: Server, published: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    run("registry", "delegate", published, "cam-*", "--team", "vision")
    made = RegistryFolder(tmp_path, samples.PASSWORD)
    made.publish_many("digits", 70)
    made.publish_many("cam-1", 70)
    pinned = (published.parent / "keys" / "root.json").read_bytes()
    updater = Updater(str(tmp_path), f"{server.url}/metadata/", bootstrap=pinned)
    updater.refresh()
    for name in ("models/fashion/2.0.0.json", "models/digits/70.json", "models/cam-1/70.json"):
        assert updater.get_targetinfo(name) is not None


def test_nothing_else_is_served(server: Server, published: Path) -> None:
    (published / "notes.txt").write_text("not for everyone")
    (published / "pending" / "fashion@9").mkdir(parents=True)
    (published / "pending" / "fashion@9" / "manifest.json").write_text("{}")
    (published / "metadata" / ".timestamp.json.part").write_text("half")
    for path in FOREIGN:
        assert server.ask(path)[0] == 404, path
        assert server.ask(path, "HEAD")[0] == 404, path


def test_a_link_out_of_the_folder_is_not_followed(server: Server, published: Path) -> None:
    target = published / blob_path("0" * 64)
    target.parent.mkdir(parents=True)
    target.symlink_to(published.parent / "keys" / "operator.pem")
    assert server.ask("/" + blob_path("0" * 64))[0] == 404


def test_it_only_reads(server: Server, blob: tuple[str, bytes]) -> None:
    for path in ("/metadata/timestamp.json", "/root.json", blob[0]):
        for method in ("POST", "PUT", "DELETE"):
            status, headers, _ = server.ask(path, method)
            assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_python_tufs_own_client_verifies_it(server: Server, published: Path, tmp_path: Path) -> None:
    pinned = (published.parent / "keys" / "root.json").read_bytes()
    folder = tmp_path / "device"
    folder.mkdir()
    updater = Updater(str(folder), f"{server.url}/metadata/", bootstrap=pinned)
    updater.refresh()
    target = updater.get_targetinfo("models/fashion/2.0.0.json")
    assert target is not None
    status, _, manifest = server.ask("/" + blob_path(target.hashes["sha256"]))
    assert status == 200
    target.verify_length_and_hashes(manifest)
    assert json.loads(manifest)["version"] == "2.0.0"
    operators = updater.get_targetinfo("operators.json")
    assert operators is not None
    operators.verify_length_and_hashes(server.ask("/" + blob_path(operators.hashes["sha256"]))[2])


def test_list_over_http_is_list_of_the_folder(
    server: Server, published: Path, run: Callable[..., Result], refused: Callable[..., str]
) -> None:
    root = published.parent / "keys" / "root.json"
    there = samples.json_of(run("registry", "list", server.url, "--root", root, "--json"))
    here = samples.json_of(run("registry", "list", published, "--json"))
    assert there["models"] == here["models"]
    assert len(there["models"]) == 2
    elsewhere = server.url + "/metadata"
    refused("registry", "list", elsewhere, "--root", root, code=5, reason="registry_unreachable")
    (published / "metadata" / "3.targets.json").write_bytes(b"{}")
    refused("registry", "list", server.url, "--root", root, code=4, reason="trust_failed")


def test_readers_see_a_whole_registry_while_it_changes(
    server: Server, published: Path, run: Callable[..., Result]
) -> None:
    pinned = published.parent / "keys" / "root.json"
    codes: list[int] = []

    def read() -> None:
        from fleet.registry.reader import Reader

        for _ in range(8):
            codes.append(len(Reader(server.url, pinned.read_bytes()).published()))

    thread = Thread(target=read)
    thread.start()
    while thread.is_alive():
        run("registry", "refresh", published)
    thread.join()
    assert codes == [2] * 8


def test_a_slow_reader_does_not_hold_the_others(server: Server, blob: tuple[str, bytes]) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(f"GET {blob[0]} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        started = time.monotonic()
        for _ in range(5):
            assert server.ask("/metadata/timestamp.json")[0] == 200
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly_and_requests_are_logged_on_request(
    registry: Path, number: signal.Signals
) -> None:
    running = Server(registry, "--access-log")
    running.ask("/metadata/timestamp.json")
    code, out, err = running.end(number)
    assert (code, out) == (0, "")
    assert "GET /metadata/timestamp.json" in err


def test_a_taken_port_is_one_line(registry: Path, refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("registry", "serve", registry, "--port", port, code=2, reason="bad_input")
    assert str(port) in line
