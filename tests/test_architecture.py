"""The arrows between rooms: who imports whom, which room imports a heavy library, and what a function loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

SHARED = ROOT / "shared"

BASE = ("errors", "units", "context", "retries", "settings", "admission", "loop_thread", "files")
"""Modules at the bottom of the runtime, each of which may import those before it."""
RUNTIME = {
    "artifacts": {*BASE},
    "arrays": {*BASE, "artifacts"},
    "processing": {*BASE, "artifacts", "arrays"},
    "codecs": {*BASE, "artifacts", "arrays", "processing"},
    "wire": {*BASE, "artifacts", "arrays", "codecs"},
    "http": {*BASE},
    "security": {*BASE, "artifacts", "http"},
    "registry": {*BASE, "artifacts", "arrays", "processing", "security"},
    "runtime": {*BASE, "artifacts", "arrays", "processing", "codecs", "wire", "registry"},
    "pipeline": {
        *BASE,
        "artifacts",
        "arrays",
        "processing",
        "codecs",
        "wire",
        "registry",
        "runtime",
        "http",
        "security",
    },
    "oip": {*BASE, "artifacts", "arrays", "wire"},
    "client": {*BASE, "artifacts", "arrays", "codecs", "wire", "http", "oip"},
}
RUNTIME["generation"] = {*RUNTIME["pipeline"], "pipeline"}
RUNTIME["events"] = {*BASE, "artifacts", "http", "registry"}
RUNTIME["routing"] = {*RUNTIME["pipeline"], "pipeline"}
RUNTIME["serving"] = {*RUNTIME["routing"], "routing", "oip", "events", "generation"}
TOOLS = {
    "budget": set(),
    "parent_death": set(),
    "array_files": set(),
    "progress": set(),
    "netem": {"parent_death"},
    "graph": {"progress"},
    "zoo": {"graph"},
    "profiling": {"graph", "budget", "progress"},
    "planner": {"graph", "profiling", "budget", "progress"},
    "calibration": {"graph", "budget", "array_files", "progress"},
    "learning": {"graph", "calibration", "profiling", "array_files", "budget", "progress", "parent_death"},
    "engine": {"parent_death"},
    "figures": {"graph", "calibration", "planner", "profiling", "learning"},
    "printable": set(),
}
TOOLS["usecases"] = set(TOOLS) - {"figures"}
"""What a room of the tools may import of the tools; of the runtime it may import anything but the functions' apps."""
SERVERS = {"usecases"}
"""Rooms of the tools that may import a function's app: `isthmus train-tail` and `federate` serve trainings."""
HEAVY = {
    "onnx": {"graph", "zoo"},
    "onnx_ir": {"graph"},
    "torch": {"graph", "learning"},
    "transformers": {"graph"},
    "skl2onnx": {"graph"},
    "skops": {"graph"},
    "keras": {"graph"},
    "tensorflow": {"graph"},
    "tf2onnx": {"graph"},
    "onnxruntime": {"runtime"},
    "boto3": {"registry", "events"},
    "botocore": {"registry", "events"},
    "obstore": {"registry"},
    "hdfs_native": {"registry"},
    "nats": {"events"},
    "nacl": {"events"},
    "paho": {"events"},
    "redis": {"events"},
    "cloudevents": {"events"},
    "sqlite3": {"events"},
    "flask": {"serving"},
    "waitress": {"serving"},
    "prometheus_client": {"serving", "engine"},
    "re2": {"processing"},
    "PIL": {"processing", "calibration", "cli"},
    "aiohttp": {"engine"},
    "typer": {"cli"},
    "matplotlib": {"figures"},
    "scipy": {"planner", "learning"},
    "highspy": {"routing"},
    "tokenizers": {"processing"},
    "jinja2": {"generation", "serving"},
    "gguf": {"graph"},
    "safetensors": {"graph"},
    "cryptography": {"security"},
    "http_message_signatures": {"security"},
    "joserfc": {"security"},
    "opentelemetry": {"serving"},
    "requests": {"serving"},
    "skimage": {"zoo"},
}
"""The rooms that may import a heavy library."""
MAX_IMPORTS = 15


def imports_of(path: Path) -> Iterator[str]:
    """The modules that a file names in its imports, those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module in ("isthmus", "isthmus_tools"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def room_of(path: Path, package: Path) -> str:
    """The folder below the package, or the module where it lies in the package itself."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def wrong_arrows(shared: Path) -> list[str]:
    """Imports that no rule allows, as `file: module`."""
    wrong = []
    for name in ("isthmus", "isthmus_tools"):
        package = shared / name
        for path in sorted(package.rglob("*.py")):
            room = room_of(path, package)
            for module in imports_of(path):
                first, _, rest = module.partition(".")
                target = rest.partition(".")[0]
                if first in ("isthmus", "isthmus_tools"):
                    allowed = is_allowed(name, room, first, target)
                else:
                    allowed = room in HEAVY.get(first, {room})
                if not allowed:
                    wrong.append(f"{path.relative_to(shared)}: {module}")
    return wrong


def project_imports(shared: Path) -> dict[str, int]:
    """Distinct modules of the project that each module imports names from."""
    counts = {}
    # A package's own `__init__` only lists what it exports.
    for path in sorted(p for p in shared.rglob("*.py") if p.parent.parent != shared or p.stem != "__init__"):
        nodes = ast.walk(ast.parse(path.read_text()))
        modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
        counts[str(path.relative_to(shared))] = sum(m.partition(".")[0].startswith("isthmus") for m in modules)
    return counts


def is_allowed(package: str, room: str, target_package: str, target: str) -> bool:
    # A package's own `__init__` names what it exports.
    if room == target or room == "__init__" or target in ("", "__version__"):
        return package == target_package or target == ""
    if package == "isthmus":
        allowed = {*BASE[: BASE.index(room)]} if room in BASE else RUNTIME.get(room, set())
        return target_package == "isthmus" and target in allowed
    if target_package == "isthmus":
        return target != "serving" or room not in TOOLS or room in SERVERS
    return room not in TOOLS or target in TOOLS[room]


def test_no_module_imports_many_others_of_the_project() -> None:
    assert {path: count for path, count in project_imports(SHARED).items() if count > MAX_IMPORTS} == {}


def test_imports_are_counted_by_module(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "from isthmus.a import b\ndef f():\n    from isthmus.a import c\n    from isthmus_tools import d\n"
    )
    assert project_imports(tmp_path) == {"a.py": 2}


def test_every_import_follows_the_arrows() -> None:
    assert wrong_arrows(SHARED) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("isthmus/pipeline/hop.py", "import isthmus_tools.graph"),
        ("isthmus/codecs/half.py", "from isthmus.serving import router"),
        ("isthmus/artifacts/bundle.py", "from isthmus import arrays"),
        ("isthmus/errors.py", "from isthmus.units import format_size"),
        ("isthmus_tools/graph/load.py", "from isthmus_tools.planner import grid"),
        ("isthmus_tools/planner/grid.py", "import torch"),
        ("isthmus/serving/app.py", "from boto3 import client"),
    ],
)
def test_a_wrong_import_is_seen(file: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"def late():\n    {line}\n")
    assert wrong_arrows(tmp_path) == [f"{file}: {wrong}" for wrong in [next(imports_of(path))]]


@pytest.mark.parametrize("function", ["router", "edge-head", "cloud-tail", "trigger"])
def test_a_function_loads_no_tool(function: str) -> None:
    """The import closure of a handler, and of all that its factory imports late, in a process without the tools."""
    script = f"""
import ast, importlib, pathlib, sys
sys.path.insert(0, {str(SHARED.parent / "functions" / function)!r})
class Refuse:
    def find_spec(self, name, path=None, target=None):
        # aiohttp is not in a function's image either; nats-py imports it where it is installed.
        if name.partition(".")[0] in ("isthmus_tools", "aiohttp"):
            raise ImportError(f"a function imports {{name}}")
sys.meta_path.insert(0, Refuse())
import handler
for path in sorted(pathlib.Path({str(SHARED / "isthmus")!r}).rglob("*.py")):
    parts = path.relative_to({str(SHARED)!r}).with_suffix("").parts
    importlib.import_module(".".join(parts).removesuffix(".__init__"))
print(sorted(name for name in sys.modules if name.startswith(("isthmus_tools", "onnx.", "torch", "typer", "aiohttp"))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_router_starts_without_generation_tokenizers_and_onnxruntime() -> None:
    late = ("isthmus.generation", "tokenizers", "onnxruntime")
    script = f"import sys, isthmus.serving.router; print([name for name in sys.modules if name.startswith({late})])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
