"""Imports point one way, and the package is light to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "zenith_det"
# Layers from the bottom up; a module may import from its own part and from those listed for it.
MIDDLE = {"config", "data", "evaluation", "report", "solver", "training"}
ALLOWED: dict[str, set[str]] = {
    "optim": set(),
    **{part: MIDDLE | {"errors", "cli", "opencv", "optim"} for part in MIDDLE},
    "errors": set(),
    "cli": {"errors"},
    "opencv": {"errors"},
    "engines": MIDDLE | {"errors", "cli", "optim"},
    "lazy": {"engines", "solver", "optim", "config", "errors"},
    "env": {"engines", "errors", "cli", "opencv"},
    "comparing": MIDDLE | {"errors"},
    "benchmarking": MIDDLE | {"engines", "errors", "cli", "optim"},
    "commands": MIDDLE | {"benchmarking", "comparing", "engines", "errors", "cli", "opencv", "optim"},
    "__main__": {"commands"},
}
ENGINE_LIBRARIES = {"torchvision", "detectron2"}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("zenith_det.")}
    assert ours - {"__version__"} <= ALLOWED[part] | {part}
    if part == "optim":
        roots = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "zenith_det", "__future__"}


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
        ("zenith_det.engines.torchvision_engine.run", ("matplotlib",)),
    ],
)
def test_import_is_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
