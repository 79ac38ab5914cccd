"""The device for one's own machine: its configuration is complete, and fits what the README starts."""

from __future__ import annotations

import re
from pathlib import Path

from edge_agent import config

ROOT = Path(__file__).parents[3]


def test_the_local_device_is_the_one_that_the_readme_deploys_to() -> None:
    made = config.load(ROOT / "examples/local/agent.toml")
    readme = (ROOT / "README.md").read_text()
    commands = readme.partition("### All of it on one machine")[2].partition("```sh")[2].partition("```")[0]
    assert f"--device {made.device} " in commands
    assert f"--broker {made.broker.host}:{made.broker.port}" in commands
    assert made.registry.url == f"http://127.0.0.1:{re.findall(r'--port ([0-9]+)', commands)[0]}"
    assert made.registry.root == "registry/root.json"
    assert (made.tenant, made.broker.tls_ca) == ("default", "")
    for path in re.findall(r"examples/local/\S+", commands):
        assert (ROOT / path).is_file()
