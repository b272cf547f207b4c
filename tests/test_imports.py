"""Imports point one way, and the package is light to import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "zenith_det"
ENGINE_LIBRARIES = {"torchvision", "detectron2"}


def rooms() -> dict[str, set[str]]:
    """The table of CONTRIBUTING: each folder or file of the package, from the bottom up, and what it may import."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        row = re.match(r"\| `zenith_det/([\w/]+?)(?:/|\.py)` \|.*\|([^|]*)\|$", line)
        if row:
            names = row[2].strip()
            found[row[1]] = (
                set(found) if names == "all of the above" else set(filter(None, names.split(", ")))
            )
    return found


ROOMS = rooms()


def names_in(tree: ast.AST) -> set[str]:
    """Dotted names that are imported anywhere below, functions included, types alone left out."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            found |= names_in(node)
    return found


def imports(path: Path) -> set[str]:
    return names_in(ast.parse(path.read_text()))


def part_of(path: Path) -> str:
    """The row of a file: the folder inside a folder, where the table has it."""
    outer, *inner = path.relative_to(PACKAGE).with_suffix("").parts
    return room if inner and (room := f"{outer}/{inner[0]}") in ROOMS else outer


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def test_the_table_names_each_room_below_those_that_import_it() -> None:
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= above, room
        above.add(room)
    assert above == {part_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    ours = {name.removeprefix("zenith_det.") for name in imports(path) if name.startswith("zenith_det.")}
    # A folder stands for the folders inside it.
    allowed = tuple(f"{room.replace('/', '.')}." for room in ROOMS[part] | {part})
    assert not [name for name in ours - {"__version__"} if not f"{name}.".startswith(allowed)]
    if part == "optim":
        roots = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "zenith_det", "__future__"}


def test_no_file_imports_itself_by_way_of_others() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = imports(path) & set(modules)
        # `from package import module` takes the module; a package's own file is not asked for then.
        packages = {name.rpartition(".")[0] for name in found}
        graph[module] = {name for name in found if name not in packages or name not in modules} - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_engines_import_engine_libraries(path: Path) -> None:
    if part_of(path) not in ("engines", "lazy"):
        assert not {name.split(".")[0] for name in imports(path)} & ENGINE_LIBRARIES


HEAVY = ("torchvision", "detectron2", "cv2", "fvcore")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("zenith_det", HEAVY),
        ("zenith_det.optim", HEAVY),
        # Half a second, and memory on each rank that draws nothing.
        ("zenith_det.engines.run", ("matplotlib",)),
    ],
)
def test_import_is_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
