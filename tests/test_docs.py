"""The documents tell the truth: diagrams are generated, and command blocks run (see test_readme.py)."""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct, structs

from edge_agent.config import Config
from edge_agent.update import machine

ROOT = Path(__file__).parent.parent


def test_the_machines_diagram_is_the_table() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    block = re.search(r"<!-- machine -->\n```mermaid\n(.*?)```\n<!-- /machine -->", text, re.DOTALL)
    assert block is not None
    assert block.group(1) == machine.diagram(), "run `python -m tests.support.docs` to write it anew"


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_configuration_key_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    sections = dict(re.findall(r"^## `\[(\w+)\]`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    for field in structs.fields(Config):
        if not isinstance(field.default, Struct):
            assert f"`{field.name}`" in text
            continue
        for key in structs.fields(field.default):
            row = re.search(rf"^\|.*`{key.name}`.*\|(.*?)\|.*\|$", sections[field.name], re.MULTILINE)
            assert row is not None, f"[{field.name}] {key.name} is not in docs/configuration.md"
            if isinstance(key.default, int | float):
                shown = [float(n) for n in re.findall(r"(?<![\d.])\d+(?:\.\d+)?(?![\d.])", row.group(1))]
                assert key.default in shown, f"[{field.name}] {key.name}: default {key.default}"


def test_every_test_that_the_page_of_threats_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "threats.md").read_text())
    assert len(named) > 30
    for path, name in named:
        text = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        assert f"def {name}(" in text, f"docs/threats.md names {path}::{name}, which is not there"
