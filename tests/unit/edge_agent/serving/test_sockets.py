"""Where the process listens: passed sockets, bound ones, and what is in the way."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from edge_agent.config import Config, Serving
from edge_agent.serving import sockets
from edge_contract.errors import InputRejected, Reason, StorageFault


def config(folder: Path, tcp: str = "127.0.0.1:0") -> Config:
    return Config("acme", "box-1", run_dir=str(folder / "run"), serving=Serving(tcp=tcp))


def close(listeners: sockets.Listeners) -> None:
    for listener in (*listeners.clients, *listeners.control):
        listener.close()
    listeners.remove_own()


def test_without_a_service_manager_all_three_are_bound(tmp_path: Path) -> None:
    listeners = sockets.open_all(config(tmp_path), {})
    kinds = [s.family for s in listeners.clients]
    assert kinds == [socket.AF_INET, socket.AF_UNIX]
    assert listeners.clients[0].proto == socket.IPPROTO_TCP
    assert len(listeners.control) == 1
    assert "control.sock" in listeners.describe()
    close(listeners)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "run" / "control.sock"))
    close(sockets.open_all(config(tmp_path), {}))


def test_a_socket_in_use_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "inference.sock"
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(path))
        used.listen()
        with pytest.raises(StorageFault, match="in use by another process"):
            sockets.open_all(config(tmp_path), {})
        assert path.exists()


def test_another_kind_of_file_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "control.sock"
    path.write_text("precious")
    with pytest.raises(StorageFault, match="is not a socket"):
        sockets.open_all(config(tmp_path), {})
    assert path.read_text() == "precious"


@pytest.mark.parametrize("address", ["127.0.0.1", "nowhere:x", "203.0.113.7:80", "127.0.0.1:99999"])
def test_addresses_that_cannot_be_bound(tmp_path: Path, address: str) -> None:
    with pytest.raises(InputRejected) as refusal:
        sockets.open_all(config(tmp_path, address), {})
    assert refusal.value.reason is Reason.BAD_CONFIG
    assert address in refusal.value.what


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        address = f"127.0.0.1:{used.getsockname()[1]}"
        with pytest.raises(InputRejected, match="cannot listen on"):
            sockets.open_all(config(tmp_path, address), {})


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    with pytest.raises((StorageFault, InputRejected)):
        sockets.open_all(config(deep), {})


def test_variables_of_another_process_are_not_ours() -> None:
    assert (
        sockets.inherited({"LISTEN_PID": "1", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "http:local:control"})
        == {}
    )
    assert sockets.inherited({}) == {}


@pytest.mark.parametrize("names", ["", "http:strange:control", "http"])
def test_passed_sockets_need_names_that_are_roles(names: str) -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3", "LISTEN_FDNAMES": names}
    with pytest.raises(InputRejected) as refusal:
        sockets.inherited({**environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": names.split(":")[-1] + "x"})
    assert "http, local, control" in refusal.value.what
