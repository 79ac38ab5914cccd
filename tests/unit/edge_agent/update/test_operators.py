"""Operators' keys: when the registry is asked for them, and that what it says is followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent import files
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.update import operators
from edge_agent.update.children import Ended
from edge_agent.update.operators import OperatorKeys
from edge_contract import canonical, wire
from edge_contract.errors import Reason, StorageFault, TransferFailed

SECOND_MS = 1000
START = 90_000


class Children:
    """Stands for the trust child: ends at once, having written what `keys` says, or having failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: list[str] = ["a"]
        self.reachable = True
        self.started = 0

    def __call__(self, arguments: list[str], *, timeout_s: float) -> Children:
        assert arguments[0] == "trust"
        assert timeout_s > 0
        self.started += 1
        return self

    def ended(self) -> Ended:
        if not self.reachable:
            error = {"reason": "registry_unreachable", "what": "nobody there", "next_step": "wait"}
            return Ended(TransferFailed.exit_code, error, False, "")
        write(self.path, *self.keys)
        return Ended(0, {"event": "done"}, False, "")

    def kill(self) -> None:
        """Nothing runs."""


def write(path: Path, *keys: str) -> None:
    named = [wire.OperatorKey(key * 64, "tests") for key in keys]
    data = canonical.to_bytes(wire.Operators(1, 1, named))
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)


def known(keys: OperatorKeys) -> list[str]:
    return [key.public_hex[0] for key in keys.keys.keys] if keys.keys else []


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(Config(tenant="t", device="d", state_dir=str(tmp_path)))


@pytest.fixture
def children(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Children:
    made = Children(layout.trust / "operators.json")
    monkeypatch.setattr(operators, "Child", made)
    return made


def run(keys: OperatorKeys, begin_ms: int, span_s: int) -> int:
    """Ticks, a second apart; returns the time afterwards."""
    for second in range(span_s):
        keys.tick(begin_ms + second * SECOND_MS)
    return begin_ms + span_s * SECOND_MS


def test_keys_are_fetched_at_once_and_then_hourly(layout: Layout, children: Children) -> None:
    keys = OperatorKeys(Path("agent.toml"), layout)
    assert (keys.keys, keys.asked) == (None, False)
    assert [keys.tick(START), keys.tick(START)] == [False, True]
    assert (known(keys), keys.asked, keys.problem) == (["a"], True, "")
    now_ms = run(keys, START, 3590)
    assert children.started == 1
    run(keys, now_ms, 20)
    assert children.started == 2


def test_a_key_that_was_removed_is_gone_after_the_next_refresh(layout: Layout, children: Children) -> None:
    children.keys = ["a", "b"]
    keys = OperatorKeys(Path("agent.toml"), layout)
    now_ms = run(keys, START, 5)
    assert known(keys) == ["a", "b"]
    children.keys = ["b", "c"]
    keys.ask(now_ms)
    run(keys, now_ms, 10)
    assert known(keys) == ["b", "c"]


def test_what_a_fetch_has_refreshed_counts_as_well(layout: Layout, children: Children) -> None:
    keys = OperatorKeys(Path("agent.toml"), layout)
    now_ms = run(keys, START, 5)
    write(children.path, "c")
    keys.tick(now_ms)
    assert known(keys) == ["c"]
    assert children.started == 1


def test_strangers_do_not_set_the_pace(layout: Layout, children: Children) -> None:
    keys = OperatorKeys(Path("agent.toml"), layout)
    now_ms = run(keys, START, 5)
    for second in range(600):
        keys.ask(now_ms + second * SECOND_MS)
        keys.tick(now_ms + second * SECOND_MS)
    assert 8 <= children.started <= 16
    # The first look after new keys is quick again.
    children.keys = ["e"]
    now_ms += 600 * SECOND_MS
    for second in range(70):
        keys.ask(now_ms + second * SECOND_MS)
        keys.tick(now_ms + second * SECOND_MS)
    assert known(keys) == ["e"]
    before = children.started
    now_ms = run(keys, now_ms + 70 * SECOND_MS, 10)
    keys.ask(now_ms)
    run(keys, now_ms, 6)
    assert children.started == before + 1


def test_a_registry_that_is_away_is_asked_ever_more_seldom(layout: Layout, children: Children) -> None:
    children.reachable = False
    keys = OperatorKeys(Path("agent.toml"), layout)
    now_ms = run(keys, START, 3600)
    assert 12 <= children.started <= 20
    assert (keys.reason, keys.asked) == (Reason.REGISTRY_UNREACHABLE, True)
    children.reachable = True
    now_ms = run(keys, now_ms, 301)
    assert known(keys) == ["a"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 100])
def test_a_damaged_cache_is_no_key(layout: Layout, children: Children, damage: bytes) -> None:
    write(children.path, "a")
    children.path.write_bytes(damage)
    keys = OperatorKeys(Path("agent.toml"), layout)
    assert keys.keys is None
    run(keys, START, 5)
    assert known(keys) == ["a"]


def test_a_cache_that_cannot_be_read_keeps_what_is_known_and_is_read_again(
    layout: Layout, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fault, just after the file was replaced, must not leave a revoked key in force."""
    write(children.path, "a")
    told: list[str] = []
    keys = OperatorKeys(Path("agent.toml"), layout, told.append)
    write(children.path, "c")

    def out_of_order(path: Path) -> bytes:
        raise StorageFault(Reason.STORAGE_FAULT, f"{path}: Input/output error", "check the disk")

    with monkeypatch.context() as disk:
        disk.setattr(files, "read", out_of_order)
        assert [keys.reload(), keys.reload()] == [False, False]
        assert known(keys) == ["a"]
    assert keys.reload()
    assert known(keys) == ["c"]
    assert len(told) == 1
    assert "Input/output error" in told[0]


def test_a_folder_in_the_place_of_the_cache_is_no_key_and_gives_way(
    layout: Layout, children: Children
) -> None:
    (children.path / "within").mkdir(parents=True)
    told: list[str] = []
    keys = OperatorKeys(Path("agent.toml"), layout, told.append)
    assert (keys.keys, len(told)) == (None, 1)
    written = canonical.to_bytes(wire.Operators(1, 1, [wire.OperatorKey("b" * 64, "tests")]))
    operators.keep(children.path, written)
    assert keys.reload()
    assert known(keys) == ["b"]


def test_a_cache_that_a_child_cannot_read_is_written_anew(
    layout: Layout, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(children.path, "a")

    def out_of_order(path: Path) -> bytes:
        raise StorageFault(Reason.STORAGE_FAULT, f"{path}: Input/output error", "check the disk")

    before = files.stamp(children.path)
    with monkeypatch.context() as disk:
        disk.setattr(files, "read", out_of_order)
        operators.keep(children.path, children.path.read_bytes())
    assert files.stamp(children.path) != before
