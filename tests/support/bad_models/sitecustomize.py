"""Found first on PYTHONPATH by the programs under test: puts backend.py in the place of the ONNX backend.

Nothing of the product knows of it: the module is replaced where Python looks for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_REPLACED = "edge_agent.serving.backends.onnx"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REPLACED:
            return None
        return importlib.util.spec_from_file_location(fullname, Path(__file__).with_name("backend.py"))


sys.meta_path.insert(0, _Finder())
