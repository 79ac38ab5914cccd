"""The agent's configuration: what is wrong with it is said so that it can be corrected."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent import config
from edge_contract.errors import InputRejected

GOOD = 'tenant = "acme"\ndevice = "box"\n'


@pytest.mark.parametrize(
    ("text", "told", "path"),
    [
        (GOOD + '[update]\nwindow = "1-5"\n', '"01:00-05:00"', "$.update.window"),
        (GOOD + '[registry]\nwindow = "01:00-05:00 CET"\n', '"22:30-04:00 UTC"', "$.registry.window"),
        (GOOD.replace("box", "box 1"), "a device's name has letters, digits", "$.device"),
        (GOOD.replace("acme", "ac/me"), "a tenant's name has letters, digits", "$.tenant"),
    ],
)
def test_how_to_write_it_is_said_without_a_pattern(tmp_path: Path, text: str, told: str, path: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(text)
    with pytest.raises(InputRejected) as error:
        config.load(file)
    assert told in error.value.what
    assert error.value.what.endswith(f"at {path}")
    assert "regex" not in str(error.value)
