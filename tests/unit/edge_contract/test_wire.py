"""Topics, and which signed messages a device believes."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from edge_contract import canonical, dsse, wire
from edge_contract.errors import MessageRejected, Reason
from tests.unit.edge_contract.samples import (
    COMMAND,
    DESIRED,
    KEY,
    NOW_MS,
    OPERATORS,
    SECOND_KEY,
    STRANGER,
    operators,
    signed,
)


def open_desired(
    data: bytes,
    *,
    trusted: wire.Operators = OPERATORS,
    device: str = "line-3",
    tenant: str = "acme",
    generation: int = 0,
    now_ms: int = NOW_MS,
) -> wire.Desired:
    return wire.open_desired(
        data, trusted, tenant=tenant, device=device, generation=generation, now_ms=now_ms
    )


def open_command(data: bytes, *, device: str = "line-3", now_ms: int = NOW_MS) -> wire.Command:
    return wire.open_command(data, OPERATORS, tenant="acme", device=device, now_ms=now_ms)


def test_topics_have_one_root_and_come_apart_again() -> None:
    topics = wire.Topics("acme", "line-3")
    assert topics.desired == "edge/v1/acme/line-3/down/desired"
    for topic in vars(topics).values():
        if topic != topics.root:
            assert wire.split_topic(topic) == ("acme", "line-3", topic.removeprefix(f"{topics.root}/"))


@pytest.mark.parametrize(
    "topic", ["", "edge/v1/acme/line-3", "edge/v2/a/b/up/state", "x/v1/a/b/up", "$SYS/a/b/c/d"]
)
def test_foreign_topics_are_nobodys(topic: str) -> None:
    assert wire.split_topic(topic) is None


def test_a_desired_state_for_this_device_opens() -> None:
    assert open_desired(signed(DESIRED)) == DESIRED


def test_the_threshold_of_the_operators_file_holds() -> None:
    assert open_desired(signed(DESIRED, KEY, SECOND_KEY), trusted=operators(2)) == DESIRED
    with pytest.raises(MessageRejected) as caught:
        open_desired(signed(DESIRED, KEY), trusted=operators(2))
    assert caught.value.reason is Reason.SIGNATURE_INVALID


def test_unsigned_or_signed_by_a_stranger_is_refused() -> None:
    for data, reason in (
        (canonical.to_bytes(DESIRED), Reason.MESSAGE_MALFORMED),
        (signed(DESIRED, STRANGER), Reason.UNSIGNED),
    ):
        with pytest.raises(MessageRejected) as caught:
            open_desired(data)
        assert caught.value.reason is reason


@pytest.mark.parametrize(("tenant", "device"), [("acme", "line-4"), ("other", "line-3")])
def test_another_devices_message_is_refused(tenant: str, device: str) -> None:
    with pytest.raises(MessageRejected) as caught:
        open_desired(signed(DESIRED), tenant=tenant, device=device)
    assert caught.value.reason is Reason.WRONG_AUDIENCE
    assert f"for acme/line-3, this device is {tenant}/{device}" in caught.value.what


def test_generations_never_go_back_and_may_repeat() -> None:
    assert open_desired(signed(DESIRED), generation=11) == DESIRED
    assert open_desired(signed(DESIRED), generation=12) == DESIRED
    with pytest.raises(MessageRejected) as caught:
        open_desired(signed(DESIRED), generation=13)
    assert caught.value.reason is Reason.STALE_GENERATION
    assert "of generation 12, this device has accepted 13" in caught.value.what


def test_expiry_is_to_the_millisecond() -> None:
    assert open_desired(signed(DESIRED), now_ms=DESIRED.expires_ms) == DESIRED
    with pytest.raises(MessageRejected) as caught:
        open_desired(signed(DESIRED), now_ms=DESIRED.expires_ms + 1)
    assert caught.value.reason is Reason.EXPIRED


def test_a_model_named_twice_is_refused() -> None:
    model = DESIRED.models[0]
    twice = replace(DESIRED, models=[model, replace(model, version="1.3.0")])
    with pytest.raises(MessageRejected, match="names a model twice") as caught:
        open_desired(signed(twice))
    assert caught.value.reason is Reason.MESSAGE_MALFORMED


def test_an_empty_set_of_models_is_a_wish_like_any_other() -> None:
    assert open_desired(signed(replace(DESIRED, models=[]))).models == []


def test_a_command_is_no_desired_state_though_an_operator_signed_it() -> None:
    with pytest.raises(MessageRejected, match="belongs"):
        open_desired(signed(COMMAND))
    with pytest.raises(MessageRejected, match="belongs"):
        open_command(signed(DESIRED))
    with pytest.raises(MessageRejected, match=r"unknown field `args` at \$|missing required field"):
        open_desired(signed(COMMAND, payload_type=wire.DESIRED_TYPE))


def test_a_command_opens_and_is_checked_alike() -> None:
    assert open_command(signed(COMMAND)) == COMMAND
    for data, device, now_ms, reason in (
        (signed(COMMAND), "line-4", NOW_MS, Reason.WRONG_AUDIENCE),
        (signed(COMMAND), "line-3", COMMAND.expires_ms + 1, Reason.EXPIRED),
        (signed(COMMAND, STRANGER), "line-3", NOW_MS, Reason.UNSIGNED),
    ):
        with pytest.raises(MessageRejected) as caught:
            open_command(data, device=device, now_ms=now_ms)
        assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation", 0),
        ("generation", 2**64),
        ("generation", True),
        ("expires_ms", -1),
        ("expires_ms", 1.5),
        ("device", "line/3"),
        ("device", "line-3\n"),
        ("device", "+"),
        ("tenant", ""),
        ("models", None),
    ],
)
def test_signed_nonsense_is_refused_by_its_field(field: str, value: object) -> None:
    payload = canonical.to_bytes({**json.loads(canonical.to_bytes(DESIRED)), field: value})
    with pytest.raises(MessageRejected) as caught:
        open_desired(dsse.sign(payload, wire.DESIRED_TYPE, [KEY]))
    assert caught.value.reason is Reason.MESSAGE_MALFORMED
    assert caught.value.what.endswith(f"at $.{field}")


def test_too_many_models_are_refused() -> None:
    model = DESIRED.models[0]
    many = replace(DESIRED, models=[replace(model, name=f"m{i}") for i in range(65)])
    with pytest.raises(MessageRejected, match=r"at \$\.models"):
        open_desired(signed(many))


@pytest.mark.parametrize(
    ("name", "args"), [("reboot", {}), ("status", {"deep": {"er": 1}}), ("status", {"list": [1]})]
)
def test_only_the_known_commands_with_flat_arguments(name: str, args: dict[str, object]) -> None:
    payload = canonical.to_bytes({**json.loads(canonical.to_bytes(COMMAND)), "name": name, "args": args})
    with pytest.raises(MessageRejected) as caught:
        open_command(dsse.sign(payload, wire.COMMAND_TYPE, [KEY]))
    assert caught.value.reason is Reason.MESSAGE_MALFORMED


def test_a_message_of_another_kind_says_which_was_expected() -> None:
    with pytest.raises(MessageRejected) as caught:
        wire.decode(b'{"schema":1}', wire.Ack)
    assert caught.value.reason is Reason.MESSAGE_MALFORMED
    assert caught.value.what == "ack message: Object missing required field `stream` at $"


def test_oversize_messages_are_refused() -> None:
    with pytest.raises(MessageRejected, match="over the limit"):
        wire.decode(b" " * (wire.LIMIT_BYTES + 1), wire.Ack)
