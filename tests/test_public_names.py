"""The names that programs import from ``zenith_det``: declared for type checkers and for Python, and the same."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zenith_det
from tests.conftest import ROOT

DETECTRON2 = "engines.detectron2_engine"


def declared_for_type_checkers() -> dict[str, str]:
    """Each name under ``if TYPE_CHECKING:`` with its module."""
    (block,) = [n for n in ast.parse(Path(zenith_det.__file__).read_text()).body if isinstance(n, ast.If)]
    return {
        alias.name: node.module.removeprefix("zenith_det.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def test_the_three_lists_agree() -> None:
    assert declared_for_type_checkers() == zenith_det._HOMES
    assert sorted(zenith_det.__all__) == sorted(zenith_det._HOMES)
    assert set(zenith_det.__all__) <= set(dir(zenith_det))


@pytest.mark.parametrize("name", sorted(n for n, home in zenith_det._HOMES.items() if home != DETECTRON2))
def test_each_name_is_there_and_public_in_its_own_package(name: str) -> None:
    home = importlib.import_module(f"zenith_det.{zenith_det._HOMES[name]}")
    assert getattr(zenith_det, name) is getattr(home, name)
    assert name in getattr(home, "__all__", [name])


@pytest.mark.detectron2
def test_the_names_that_need_detectron2() -> None:
    pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")
    from zenith_det import ZenithMetrics, ZenithTrainer, ZenithTrainerMixin

    assert issubclass(ZenithTrainer, ZenithTrainerMixin)
    assert ZenithMetrics.__module__ == "zenith_det.engines.detectron2_engine.hooks"


def run(code: str, *path: Path) -> str:
    """The last line that a program prints, errors included."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))},
    )  # fmt: skip
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_without_detectron2_its_names_say_so() -> None:
    missing = "import sys; sys.modules['detectron2'] = None; "
    # As find_spec sees it, too.
    missing += "import importlib.util as u; find = u.find_spec; "
    missing += "u.find_spec = lambda name, *a: None if name == 'detectron2' else find(name, *a); "
    told = run(f"{missing}from zenith_det import ZenithTrainerMixin")
    assert told.startswith(
        "ImportError: ZenithTrainerMixin needs Detectron2, and detectron2 is not installed; to install it: pip"
    )
    assert run(f"{missing}from zenith_det import ZENITH; print(ZENITH.__name__)") == "ZENITH"


def test_a_broken_detectron2_is_told_with_its_reason(tmp_path: Path) -> None:
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('undefined symbol: _ZN')\n")
    told = run("import zenith_det; zenith_det.ZenithTrainer", tmp_path)
    assert told.startswith("ImportError: ZenithTrainer needs Detectron2, and detectron2 ")
    assert f"in {package} cannot be imported (OSError: undefined symbol: _ZN)" in told


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'zenith_det' has no attribute 'Zenith'"):
        _ = zenith_det.Zenith  # type: ignore[attr-defined]
