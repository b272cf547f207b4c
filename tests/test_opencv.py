"""Without OpenCV everything but drawing works, and what draws says what to install."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SmallSet
from zenith_det import env, opencv
from zenith_det.data import load_coco_dataset
from zenith_det.engines.run_pictures import draw_run
from zenith_det.errors import MissingLibraryError, UserError


@pytest.fixture
def no_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)


def test_it_is_the_module_that_is_there() -> None:
    import cv2

    assert opencv.resize is cv2.resize
    with pytest.raises(AttributeError):
        _ = opencv.nothing_of_that_name


def test_asked_for_where_there_is_none(no_opencv: None) -> None:
    with pytest.raises(MissingLibraryError, match=r"isn't installed: pip install opencv-python-headless"):
        _ = opencv.resize
    assert issubclass(MissingLibraryError, UserError)
    assert issubclass(MissingLibraryError, ImportError)


def test_one_that_misses_a_library_of_the_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    with pytest.raises(MissingLibraryError, match=r"libGL.so.1.*pip install opencv-python-headless$"):
        _ = opencv.resize


def test_a_run_ends_well_without(
    no_opencv: None, shapes: SmallSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = load_coco_dataset(shapes.val)
    with caplog.at_level(logging.WARNING):
        assert draw_run(tmp_path, dataset, []) == []
    assert (
        "predictions.png isn't drawn: OpenCV is needed to draw and isn't installed: pip install"
        in caplog.text
    )


def test_commands_that_draw_are_one_line(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")
    code = (
        "import sys; sys.modules['cv2'] = None\n"
        "import zenith_det.report.run_report, zenith_det.report.html, zenith_det.commands.demo\n"
        "from zenith_det import cli; from zenith_det.data.synthetic import generate\n"
        "cli.run(lambda: generate('set', train=1, val=1, size=64, task='instances'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: OpenCV is needed to draw and isn't installed: pip install")
    assert len(done.stderr.splitlines()) == 1


def test_env_tells_of_none_and_of_two() -> None:
    assert env._opencv_problems({"opencv-python"}) == []
    assert env._opencv_problems({"opencv-python-headless", "numpy"}) == []
    (told,) = env._opencv_problems({"opencv-python", "opencv-python-headless"})
    assert "overwrite each other's cv2" in told
