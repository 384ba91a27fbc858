"""The order of the house: imports point down the line of docs/architecture.md, every operator is tested and timed."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each room may import from its own floor and from those before it.
FLOORS = [
    ("_C", "triton_kernels"),
    ("_native",),
    ("ops",),
    ("tasks", "record", "data"),
    ("capturing",),
    ("sketch",),
    ("store",),
    ("attribution",),
    ("adapters",),
    ("train",),
    ("launch", "evaluate"),
    ("mixing", "stages", "meta"),
    ("strategy",),
    ("cli", "__main__"),
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Rooms on one floor that must not know each other: they meet in shared nouns.
STRANGERS = {"mixing", "stages", "meta"}
# Reads data only; so it stands beside the store, and whoever stands higher may call it.
FLOOR_OF["report"] = FLOOR_OF["store"]
REPORT_READS = {"tasks", "record", "store", "report"}


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT / "fastsft").with_suffix("").parts
    return "fastsft" if parts == ("__init__",) else parts[0]


def rooms_named(target: str, names: list[str], rooms: set[str]) -> set[str]:
    """Rooms that `from target import names` reaches; "fastsft" for the package's own top."""
    parts = target.split(".")
    if parts[0] != "fastsft":
        return set()
    if len(parts) > 1:
        return {parts[1]}
    return {name if name in rooms else "fastsft" for name in names} or {"fastsft"}


def imports_of(source: str, package: str, rooms: set[str]) -> set[str]:
    """Rooms imported anywhere in a file, inside functions too. `package` is the folder's dotted name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= rooms_named(alias.name, [], rooms)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            found |= rooms_named(target, [alias.name for alias in node.names], rooms)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found |= rooms_named(str(node.args[0].value), [], rooms)
    return found


def why_wrong(room: str, imported: str) -> str | None:
    """Say what is wrong with `room` importing from `imported`, or None."""
    if imported == room or room == "fastsft":
        return None
    if room == "report":
        return None if imported in REPORT_READS else "report reads data only"
    if room == "cli" and imported == "fastsft":
        return None
    if imported == "fastsft":
        return "import the room itself, not the top of the package"
    unknown = {name for name in (room, imported) if name not in FLOOR_OF}
    if unknown:
        return f"{unknown} has no floor in FLOORS"
    if FLOOR_OF[imported] > FLOOR_OF[room]:
        return "imports point down"
    if {room, imported} <= STRANGERS:
        return "feature rooms meet in shared nouns, not in imports"
    return None


FILES = sorted((ROOT / "fastsft").rglob("*.py"))
ROOMS = {room_of(file) for file in FILES} | set(FLOOR_OF)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    package = ".".join(file.parent.relative_to(ROOT).parts)
    for imported in imports_of(file.read_text(), package, ROOMS):
        wrong = why_wrong(room_of(file), imported)
        assert wrong is None, f"{file.relative_to(ROOT)} imports from {imported}: {wrong}."


@pytest.mark.parametrize(
    ("source", "package", "imported"),
    [
        ("from fastsft.train import x", "fastsft.ops", {"train"}),
        ("def f():\n    import fastsft.store.scan", "fastsft.ops", {"store"}),
        ("from fastsft import ops, attach", "fastsft.data", {"ops", "fastsft"}),
        ("from ..sketch import spec", "fastsft.capturing", {"sketch"}),
        ("from . import spec", "fastsft.sketch", {"sketch"}),
        ("import importlib\nimportlib.import_module('fastsft.cli')", "fastsft.ops", {"cli"}),
        ("import torch", "fastsft.ops", set()),
    ],
)
def test_the_reader_of_imports_sees(source, package, imported):
    assert imports_of(source, package, ROOMS) == imported


@pytest.mark.parametrize(
    ("room", "imported", "allowed"),
    [
        ("attribution", "ops", True),
        ("ops", "attribution", False),
        ("mixing", "stages", False),
        ("mixing", "train", True),
        ("evaluate", "launch", True),
        ("report", "record", True),
        ("report", "attribution", False),
        ("train", "report", True),
        ("capture", "report", False),
        ("cli", "report", True),
        ("data", "fastsft", False),
        ("cellar", "ops", False),
    ],
)
def test_the_rule_itself(room, imported, allowed):
    assert (why_wrong(room, imported) is None) == allowed


@pytest.mark.parametrize("op", [file.stem for file in (ROOT / "fastsft/ops").glob("[!_]*.py")])
def test_every_op_is_tested_and_timed(op):
    assert (ROOT / f"tests/ops/test_{op}.py").exists()
    assert (ROOT / f"benchmarks/ops/bench_{op}.py").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "triton_kernels").glob("*.py")), ids=lambda file: file.name)
def test_kernels_import_only_torch_and_triton(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= {"torch", "triton"}


def test_every_kernel_file_is_an_op():
    ops = {file.stem for file in (ROOT / "fastsft/ops").glob("[!_]*.py")}
    assert {file.stem for file in (ROOT / "triton_kernels").glob("[!_]*.py")} <= ops


def test_native_sources_include_no_torch():
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.is_file()]
    assert sources
    for file in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", file.read_text()), file
