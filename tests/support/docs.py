"""Writes the generated parts of the documents anew: `python -m tests.support.docs`."""

from __future__ import annotations

import re
from pathlib import Path

from edge_agent.update import machine

ARCHITECTURE = Path(__file__).parent.parent.parent / "ARCHITECTURE.md"


def main() -> None:
    """Put the machine's diagram between its marks."""
    text = ARCHITECTURE.read_text()
    block = f"<!-- machine -->\n```mermaid\n{machine.diagram()}```\n<!-- /machine -->"
    pattern = r"<!-- machine -->.*?<!-- /machine -->"
    ARCHITECTURE.write_text(re.sub(pattern, lambda _: block, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
