"""Every format, pinned byte for byte. A golden file changes only together with a schema number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_contract import canonical, dsse, manifest, wire
from tests.unit.edge_contract import samples

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.json").read_bytes().removesuffix(b"\n")


def test_there_is_a_golden_file_for_each_sample_and_no_other() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(samples.ALL)


def test_every_message_of_the_wire_has_a_golden_file() -> None:
    parts_of_others = {"ModelState", "DesiredModel", "VersionTelemetry", "OperatorKey", "Gone", "_Message"}
    messages = {
        name
        for name, kind in vars(wire).items()
        if isinstance(kind, type) and issubclass(kind, wire._Message) and name not in parts_of_others
    }
    assert messages <= {type(value).__name__ for value in samples.ALL.values()}


@pytest.mark.parametrize("name", sorted(samples.ALL))
def test_value_and_bytes_are_each_others_image(name: str) -> None:
    value = samples.ALL[name]
    assert canonical.to_bytes(value) == golden(name)
    decoded = canonical.from_bytes(golden(name), type(value))
    assert decoded == value
    assert canonical.to_bytes(decoded) == golden(name)


@pytest.mark.parametrize("name", sorted(samples.ALL))
def test_samples_show_every_field(name: str) -> None:
    """A field left at its default would not be pinned where it matters."""
    value = samples.ALL[name]
    assert set(json.loads(golden(name))) == {field.encode_name for field in msgspec.structs.fields(value)}


def test_the_manifest_passes_its_own_door() -> None:
    assert manifest.from_bytes(golden("manifest")) == samples.MANIFEST
    assert manifest.to_bytes(samples.MANIFEST) == golden("manifest")


def test_the_golden_envelope_opens_with_its_keys() -> None:
    trusted = samples.OPERATORS.trusted()
    payload = dsse.open_envelope(golden("envelope"), wire.DESIRED_TYPE, trusted, threshold=2)
    assert payload == golden("desired")


@pytest.mark.parametrize("name", sorted(samples.ALL))
def test_an_unknown_key_is_refused_by_its_name(name: str) -> None:
    value = samples.ALL[name]
    with pytest.raises(canonical.DecodeFault, match="unknown field `surprise`"):
        canonical.from_bytes(altered(golden(name), {"surprise": 1}), type(value))


@pytest.mark.parametrize("name", sorted(samples.ALL))
def test_each_field_refuses_another_type(name: str) -> None:
    """An object where none belongs; a list where an object does. The fault's path begins at the field."""
    kind = type(samples.ALL[name])
    for field, old in json.loads(golden(name)).items():
        wrong: Any = [] if isinstance(old, dict) else {}
        with pytest.raises(canonical.DecodeFault) as caught:
            canonical.from_bytes(altered(golden(name), {field: wrong}), kind)
        assert caught.value.path.startswith(f"$.{field}")


@pytest.mark.parametrize("name", [n for n, value in samples.ALL.items() if hasattr(value, "schema")])
def test_another_schema_number_is_refused(name: str) -> None:
    for schema in (0, 2, "1", True, 1.0):
        with pytest.raises(canonical.DecodeFault) as caught:
            canonical.from_bytes(altered(golden(name), {"schema": schema}), type(samples.ALL[name]))
        assert caught.value.path == "$.schema"


def altered(data: bytes, fields: dict[str, Any]) -> bytes:
    return json.dumps({**json.loads(data), **fields}).encode()
