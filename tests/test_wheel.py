"""A wheel as pip builds it, unpacked far from the checkout: what it holds, and that its command works there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build leaves files of its own, and those of an earlier one would be packed again.
    for name in ("zenith_det", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--wheel-dir", folder, folder / "source"],
        check=True, cwd=folder, env=environment(),
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def test_it_holds_the_package_with_its_configs(unpacked: Path) -> None:
    def files(folder: Path, pattern: str) -> set[str]:
        return {str(file.relative_to(folder)) for file in folder.rglob(pattern)}

    assert files(unpacked / "zenith_det", "*.py") == files(ROOT / "zenith_det", "*.py")
    assert files(unpacked / "zenith_det/configs", "*.yaml") == files(ROOT / "configs", "*.yaml")
    assert (unpacked / "zenith_det/py.typed").is_file()
    templates = "report/templates"
    assert files(unpacked / "zenith_det" / templates, "*") == files(ROOT / "zenith_det" / templates, "*")
    others = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert others == {"zenith_det"}, "tools, tests and configs are names that other packages have, too"
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "zenith-det = zenith_det.commands:main" in entry_points.read_text()


def test_it_requires_no_package_that_overwrites_another_ones_cv2(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    required = re.findall(r"^Requires-Dist: (opencv.*)$", metadata.read_text(), re.MULTILINE)
    assert required
    assert all("extra ==" in requirement for requirement in required)


def test_its_command_finds_its_own_configs_from_any_folder(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    # Before an editable installation.
    start = f"import sys; sys.path[:0] = [{str(unpacked)!r}]; "
    command = [sys.executable, "-c", f"{start} from zenith_det.commands import main; main()", "train"]
    command += [
        "--engine",
        "torchvision",
        "--num-gpus",
        "0",
        "--config-file",
        "quickstart/mask_rcnn_small.yaml",
    ]
    command += ["--train-json", "train.json", "--train-images", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    # The config was read and is in use; what is wrong are the empty annotations.
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/train.json: "), done.stderr
    code = f"{start} from zenith_det.config import finding; print(finding.shipped_folder())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert done.stdout.strip() == str(unpacked / "zenith_det/configs"), done.stderr
