"""What rises, what never sinks, and the one way in which a stolen key's word is forgotten."""

from __future__ import annotations

import pytest

from edge_agent.update import levels
from edge_agent.update.levels import Below, Holders, Level, MetadataFloor, OrderFloor, Seen, SignedTime


def seen(
    role: str,
    version: int,
    signers: str = "a",
    holders: str = "a",
    threshold: int = 1,
    at_s: int | None = None,
) -> Seen:
    return Seen(role, version, frozenset(signers), (Holders(frozenset(holders), threshold),), at_s)


FLOOR = MetadataFloor(
    roles={"root": Level(4, []), "timestamp": Level(20, ["a"]), "bin-1": Level(3, ["a", "b"])},
    time=SignedTime(5000, ["a"]),
)


@pytest.mark.parametrize("role", ["timestamp", "bin-1", "root"])
def test_an_older_version_of_any_role_is_below_the_floor(role: str) -> None:
    old = FLOOR.roles[role].version - 1
    assert levels.judge(FLOOR, [seen("other", 1), seen(role, old)]) == Below(role, old, old + 1)
    assert levels.judge(FLOOR, [seen(role, old + 1)]) is None
    assert levels.judge(FLOOR, [seen(role, old + 9)]) is None


def test_versions_rise_and_stay() -> None:
    floor = levels.raised(FLOOR, [seen("timestamp", 22), seen("bin-1", 2), seen("bin-2", 1)])
    assert {role: level.version for role, level in floor.roles.items()} == {
        "root": 4,
        "timestamp": 22,
        "bin-1": 3,
        "bin-2": 1,
    }


def test_what_rotated_keys_signed_binds_no_longer() -> None:
    new = seen("timestamp", 1, signers="x", holders="x")
    assert levels.judge(FLOOR, [new]) is None
    assert levels.raised(FLOOR, [new]).roles["timestamp"] == Level(1, ["x"])


def test_what_one_of_two_remaining_keys_signed_binds() -> None:
    assert levels.judge(FLOOR, [seen("timestamp", 1, signers="x", holders="ax")]) is not None
    # Signed by one alone, while it takes two by now: it would not be believed any more.
    assert levels.judge(FLOOR, [seen("timestamp", 1, signers="ax", holders="ax", threshold=2)]) is None
    assert levels.judge(FLOOR, [seen("bin-1", 1, signers="ab", holders="abc", threshold=2)]) is not None


def test_new_keys_of_the_snapshot_free_all_that_it_lists() -> None:
    """As in TUF: who held the snapshot's key may have listed absurd versions of any targets."""
    floor = MetadataFloor(roles={**FLOOR.roles, "snapshot": Level(30, ["s"])})
    old = seen("snapshot", 30, signers="s", holders="s")
    new = seen("snapshot", 1, signers="t", holders="t")
    assert levels.judge(floor, [old, seen("bin-1", 1)]) == Below("bin-1", 1, 3)
    assert levels.judge(floor, [new, seen("bin-1", 1)]) is None
    after = levels.raised(floor, [new])
    assert set(after.roles) == {"root", "timestamp", "snapshot"}
    assert levels.judge(after, [new, seen("timestamp", 19)]) == Below("timestamp", 19, 20)


def test_of_several_delegators_any_may_vouch() -> None:
    two = Seen("bin-1", 1, frozenset("x"), (Holders(frozenset("x"), 1), Holders(frozenset("a"), 1)))
    assert levels.judge(FLOOR, [two]) == Below("bin-1", 1, 3)


def test_the_roots_level_binds_whoever_signed() -> None:
    assert levels.judge(FLOOR, [seen("root", 3, signers="z", holders="z")]) == Below("root", 3, 4)


def test_time_comes_from_the_registry_and_only_rises() -> None:
    assert levels.raised(FLOOR, [seen("timestamp", 21, at_s=6000)]).at_s == 6000
    assert levels.raised(FLOOR, [seen("timestamp", 21, at_s=4000)]).at_s == 5000
    assert levels.raised(FLOOR, [seen("timestamp", 21)]).at_s == 5000
    assert levels.raised(MetadataFloor(), [seen("timestamp", 1)]).at_s == 0


def test_a_time_of_a_stolen_key_is_forgotten_with_the_key() -> None:
    floor = levels.raised(FLOOR, [seen("timestamp", 1, signers="x", holders="x", at_s=4000)])
    assert floor.time == SignedTime(4000, ["x"])
    assert levels.raised(FLOOR, [seen("timestamp", 1, signers="x", holders="x")]).at_s == 0
    assert levels.with_time(FLOOR, None).at_s == 0
    assert levels.with_time(FLOOR, None).roles == FLOOR.roles


def test_now_is_never_before_the_registrys_last_word() -> None:
    assert levels.now_s(0, FLOOR) == 5000
    assert levels.now_s(6000.5, FLOOR) == 6000.5
    assert levels.behind_s(4000, FLOOR) == 1000
    assert levels.behind_s(6000, FLOOR) == 0
    assert levels.now_s(7, MetadataFloor()) == 7


def test_generations_and_releases_only_rise() -> None:
    floor = levels.with_generation(levels.with_generation(OrderFloor(), 5), 3)
    floor = levels.with_releases(levels.with_releases(floor, {"m": 4, "n": 1}), {"m": 2, "o": 7})
    assert floor == OrderFloor(generation=5, releases={"m": 4, "n": 1, "o": 7})
