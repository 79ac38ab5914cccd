"""The dependency rules, read from the source: who may import whom, and who may do what.

It parses; it does not run the code, except for one child process that shows what the control process
really loads. Each exception stands here with its reason.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTRACT = "edge_contract"
PROGRAMS = ("optimizer", "edge_agent", "fleet")
PACKAGES = (CONTRACT, *PROGRAMS)

# Inside the agent: each layer imports only layers below it; slices never each other.
ENTRY = ("cli", "__main__")
COMPOSERS = ("app", "supervisor", "status")  # `status` tells what all three slices left on the disk
SLICES = ("messaging", "update", "serving")

# Imported in one file per program, so that its exceptions have one place to be translated.
RUNTIMES = ("onnxruntime", "ai_edge_litert", "tflite_runtime", "paho", "tuf")
# A runtime may have a folder instead of a file: (program, runtime) → folder and why.
RUNTIME_FOLDERS: dict[tuple[str, str], tuple[str, str]] = {
    ("fleet", "tuf"): ("fleet/registry/", "publishing, signing and reading metadata are three jobs"),
}

# What the control process must never load: it lives in tens of megabytes beside the models.
HEAVY = ("numpy", "onnxruntime", "onnx", "ai_edge_litert", "tflite_runtime", "tuf", "uvicorn")

DURABLE = "edge_agent/files.py"
DURABLE_CALLS = (
    "os.rename",
    "os.renames",
    "os.replace",
    "os.fsync",
    "os.fdatasync",
    "os.sync",
    "shutil.move",
)

# Modules and calls that a pure module has no business with.
IMPURE_MODULES = (
    *("socket", "ssl", "select", "selectors", "asyncio", "threading", "multiprocessing", "subprocess"),
    *("sqlite3", "paho", "tuf", "onnxruntime", "urllib", "http", "shutil", "tempfile", "logging", "psutil"),
)
IMPURE_CALLS = (
    *("open", "print", "input", "exec", "eval"),
    *("time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.perf_counter", "time.sleep"),
    *("datetime.now", "datetime.utcnow", "datetime.today", "date.today", "datetime.datetime.now"),
    *(
        "random.random",
        "random.uniform",
        "random.randint",
        "random.choice",
        "os.urandom",
        "secrets.token_hex",
    ),
    *("os.environ.get", "os.getenv", "os.open", "os.listdir", "os.stat", "os.getpid"),
)
IMPURE_METHODS = (
    *("read_text", "read_bytes", "write_text", "write_bytes", "exists", "is_file", "is_dir", "mkdir"),
    *("unlink", "iterdir", "glob", "rglob", "stat", "touch", "symlink_to", "readlink", "resolve"),
)

# rule → {subject: reason}. Every exception must still be needed, or the test of the rule fails.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "layers": {},
    "one file per runtime": {},
    "durable calls": {},
    "pure": {},
    "cycles": {},
}


@dataclass(frozen=True)
class Import:
    """One imported name: by which module, from which one (`name` is empty for `import x`), and where."""

    source: str
    target: str
    name: str
    line: int
    dynamic: bool = False

    def __str__(self) -> str:
        return f"{path_of(self.source)}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file, for every module of the four packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def path_of(module: str) -> str:
    return modules()[module].relative_to(ROOT).as_posix()


@cache
def imports(module: str) -> tuple[Import, ...]:
    """All imports of a module, also those inside functions and for type checking only."""
    found = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found += [Import(module, alias.name, "", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            found += [i for i in named_at_run_time(module) if base == "importlib"]
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append(Import(module, full if full in modules() else base, alias.name, node.lineno))
    return tuple(found)


def named_at_run_time(module: str) -> list[Import]:
    """What a module that uses importlib may import: every string in it that is a name of interest."""
    return [
        Import(module, node.value, "", node.lineno, dynamic=True)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"\w+(\.\w+)+", node.value) and top(node.value) in (*PACKAGES, *RUNTIMES, *HEAVY)
    ]


def absolute(module: str, node: ast.ImportFrom) -> str:
    """What `from … import` names, relative imports resolved."""
    if not node.level:
        return node.module or ""
    package = module.split(".")
    if modules()[module].name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def all_imports(packages: Iterable[str] = PACKAGES) -> Iterator[Import]:
    for module in modules():
        if top(module) in packages:
            yield from imports(module)


def top(module: str) -> str:
    return module.partition(".")[0]


def judge(rule: str, broken: Iterable[tuple[str, str]]) -> None:
    """Fail unless the subjects that break a rule are exactly its exceptions. Pairs: (subject, message)."""
    allowed = EXCEPTIONS[rule]
    found = list(broken)
    new = [message for subject, message in found if subject not in allowed]
    assert not new, f"{rule}:\n" + "\n".join(new)
    unneeded = set(allowed) - {subject for subject, _ in found}
    assert not unneeded, f"{rule}: exceptions that nothing needs any more: {sorted(unneeded)}"


# --- programs and contract ---


def test_the_packages_are_where_this_test_looks() -> None:
    assert {top(module) for module in modules()} == set(PACKAGES)
    assert len(modules()) > 40


def test_programs_never_import_each_other() -> None:
    others = [
        str(i) for i in all_imports(PROGRAMS) if top(i.target) in PROGRAMS and top(i.target) != top(i.source)
    ]
    assert others == []


def test_the_contract_imports_no_program() -> None:
    assert [str(i) for i in all_imports([CONTRACT]) if top(i.target) in PROGRAMS] == []


# --- layers of the agent ---


def layer(module: str) -> tuple[int, str]:
    """Rank (high imports low) and the slice's name, empty for all but slices."""
    parts = module.split(".")
    second = parts[1] if len(parts) > 1 else ""
    if second in ENTRY:
        return 4, ""
    if second in COMPOSERS:
        return 3, ""
    if second in SLICES:
        return 2, second
    return 1, ""


def goes_down(source: str, target: str) -> bool:
    (high, from_slice), (low, to_slice) = layer(source), layer(target)
    if high == low:
        # Leaf modules may use each other; a slice itself; composers and entries nobody of their own rank.
        return (
            high == 1 or (high == 2 and from_slice == to_slice) or (high == 4 and source.endswith("__main__"))
        )
    return high > low


def test_inside_the_agent_imports_go_down() -> None:
    broken = [
        (f"{i.source} → {i.target}", str(i))
        for i in all_imports(["edge_agent"])
        if top(i.target) == "edge_agent" and not goes_down(i.source, i.target)
    ]
    judge("layers", broken)


def test_the_slices_are_folders_and_the_composers_files() -> None:
    assert all((ROOT / "edge_agent" / name / "__init__.py").is_file() for name in SLICES)
    assert all((ROOT / "edge_agent" / f"{name}.py").is_file() for name in (*COMPOSERS, *ENTRY))


# --- third-party runtimes ---


def users(program: str, runtime: str) -> list[str]:
    found = {path_of(i.source) for i in all_imports([program]) if top(i.target) == runtime}
    return sorted(found)


def test_each_runtime_is_imported_in_one_file_per_program() -> None:
    broken = []
    for program, runtime in itertools.product(PROGRAMS, RUNTIMES):
        folder, _ = RUNTIME_FOLDERS.get((program, runtime), ("", ""))
        files = users(program, runtime)
        outside = [file for file in files if not file.startswith(folder)] if folder else files[1:]
        if outside:
            broken.append((f"{program}: {runtime}", f"{runtime} is imported by {', '.join(files)}"))
    judge("one file per runtime", broken)


def test_the_seams_of_the_agent() -> None:
    """The rule above also holds when nobody imports a runtime; here they are, by name."""
    assert users("edge_agent", "paho") == ["edge_agent/messaging/mqtt.py"]
    assert users("edge_agent", "tuf") == ["edge_agent/update/trust.py"]
    assert users("edge_agent", "onnxruntime") == ["edge_agent/serving/backends/onnx.py"]
    assert users("edge_agent", "ai_edge_litert") == ["edge_agent/serving/backends/tflite.py"]


# --- what the control process loads ---


def closure(start: str) -> set[str]:
    """Every module of ours that `start` can reach by any import, also those inside functions."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in reached or module not in modules():
            continue
        reached.add(module)
        waiting += [i.target for i in imports(module)]
    return reached


def test_nothing_that_the_control_process_can_reach_imports_a_model_runtime() -> None:
    reached = closure("edge_agent.app")
    assert "edge_agent.update.updater" in reached
    heavy = [str(i) for module in reached for i in imports(module) if top(i.target) in HEAVY]
    assert heavy == []


def test_the_control_process_loads_no_model_runtime() -> None:
    code = "import edge_agent.app, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = {top(module) for module in json.loads(done.stdout)}
    assert "edge_agent" in loaded
    assert loaded.isdisjoint(HEAVY)


# --- effects ---


def dotted(node: ast.expr) -> str:
    """`os.replace` of an expression, empty when it is more than names and dots."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def calls(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, ast.Call))


def renames(call: ast.Call) -> bool:
    """`path.rename(x)` and `path.replace(x)`; a string's replace has two arguments."""
    return (
        isinstance(call.func, ast.Attribute)
        and call.func.attr in ("rename", "replace")
        and len(call.args) + len(call.keywords) == 1
    )


def test_only_files_py_renames_and_syncs() -> None:
    broken = []
    for module in modules():
        if top(module) != "edge_agent" or path_of(module) == DURABLE:
            continue
        broken += [
            (path_of(module), str(i)) for i in imports(module) if f"{i.target}.{i.name}" in DURABLE_CALLS
        ]
        for call in calls(module):
            if dotted(call.func) in DURABLE_CALLS or renames(call):
                broken.append((path_of(module), f"{path_of(module)}:{call.lineno} {ast.unparse(call)}"))
    judge("durable calls", broken)


def test_files_py_does_rename_and_sync() -> None:
    """Else the rule above would look for the wrong spelling."""
    used = {dotted(call.func) for call in calls("edge_agent.files")}
    assert {"os.replace", "os.fsync"} <= used


def pure_modules() -> list[str]:
    return [m for m in modules() if (ast.get_docstring(tree(m)) or "").startswith("Pure:")]


def test_decisions_are_declared_pure() -> None:
    """The modules that must stay so. A new one is welcome without being listed."""
    pure = set(pure_modules())
    assert {
        f"edge_contract.{name}" for name in ("canonical", "dsse", "errors", "manifest", "profile", "wire")
    } <= pure
    assert {
        f"edge_agent.{name}" for name in ("layout", "stats", "update.machine", "update.probation")
    } <= pure
    assert {f"optimizer.{name}" for name in ("choose", "recipes")} <= pure


def impurities(module: str) -> Iterator[tuple[str, str]]:
    where = path_of(module)
    for i in imports(module):
        if top(i.target) in IMPURE_MODULES:
            yield f"{where}: {top(i.target)}", str(i)
    for call in calls(module):
        name = dotted(call.func)
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if name in IMPURE_CALLS or method in IMPURE_METHODS:
            yield f"{where}: {name or method}", f"{where}:{call.lineno} calls {ast.unparse(call)}"


def test_pure_modules_have_no_effects_and_read_no_clock() -> None:
    judge("pure", [found for module in pure_modules() for found in impurities(module)])


# --- cycles ---


def cycles() -> list[list[str]]:
    """Groups of modules that import each other in a circle (Tarjan 1972), imports in functions included.

    Not those by a name chosen at run time: an interface may know the names of its implementations.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in {i.target for i in imports(module) if not i.dynamic} & set(modules()):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for module in modules():
        if module not in index:
            visit(module)
    return found


def test_no_import_cycles() -> None:
    judge("cycles", [(" ↔ ".join(group), " ↔ ".join(group)) for group in cycles()])
