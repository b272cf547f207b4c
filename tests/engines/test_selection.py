"""Which engine is chosen, and what a user is told, with real, missing and broken installations."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from zenith_det.engines import selection
from zenith_det.errors import ConfigError


def run_python(code: str, path: Path) -> str:
    """Run ``code`` in a fresh interpreter that finds ``path`` before every installed package."""
    lines = [f"import sys; sys.path.insert(0, {str(path)!r})", textwrap.dedent(code)]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CHOOSE_AUTO = """
    from zenith_det.engines.selection import select_engine
    choice = select_engine("auto")
    print(choice.name, "|", choice.reason)
"""


def fake_detectron2(folder: Path, body: str) -> None:
    package = folder / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text(body)


def test_broken_detectron2_is_passed_over_with_its_own_error(tmp_path: Path) -> None:
    fake_detectron2(tmp_path, "raise OSError('libcudart.so.11: cannot open\\nsecond line')")
    out = run_python(CHOOSE_AUTO, tmp_path)
    assert out.startswith("torchvision | detectron2")
    assert "OSError: libcudart.so.11: cannot open" in out
    assert "second line" not in out
    assert selection.DETECTRON2_INSTALL_PAGE in out


def test_detectron2_without_its_compiled_part_is_passed_over(tmp_path: Path) -> None:
    fake_detectron2(tmp_path, "")
    out = run_python(CHOOSE_AUTO, tmp_path)
    assert out.startswith("torchvision |")
    assert "detectron2._C" in out


def test_a_folder_named_detectron2_is_not_taken_for_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "detectron2").mkdir()
    finder = selection.importlib.util.find_spec
    monkeypatch.syspath_prepend(str(tmp_path))
    # A real installation would win over a bare folder: leave the folder alone on the path.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    assert finder("detectron2") is not None
    status = selection.probe_detectron2()
    assert not status.usable
    assert str(tmp_path / "detectron2") in status.problem


def test_missing_detectron2_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: None)
    status = selection.probe_detectron2()
    assert "--no-build-isolation" in status.problem
    assert "setuptools<81" in status.problem
    assert selection.DETECTRON2_INSTALL_PAGE in status.problem
    with pytest.raises(ConfigError, match="not installed"):
        selection.select_engine("detectron2")
    with pytest.raises(ConfigError, match=r"no engine can be used: detectron2 .*torchvision"):
        selection.select_engine("auto")


def test_torchvision_is_chosen_without_importing_detectron2(tmp_path: Path) -> None:
    fake_detectron2(tmp_path, "raise SystemExit('imported')")
    out = run_python(CHOOSE_AUTO.replace('"auto"', '"torchvision"'), tmp_path)
    assert out == "torchvision | asked for"


def test_unknown_engine_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--engine keras: .*auto, detectron2, torchvision"):
        selection.select_engine("keras")


def test_every_problem_is_one_line(tmp_path: Path) -> None:
    fake_detectron2(tmp_path, "raise RuntimeError('one\\ntwo\\nthree')")
    assert len(run_python(CHOOSE_AUTO, tmp_path).splitlines()) == 1


def test_model_zoo_without_pkg_resources_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        selection, "import_problem", lambda *names: "ModuleNotFoundError: No module named 'pkg_resources'"
    )
    assert 'pip install "setuptools<81"' in selection.probe_model_zoo().problem
