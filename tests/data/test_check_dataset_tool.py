"""tools/check_dataset.py: the table, and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .builders import content, write

ROOT = Path(__file__).resolve().parents[2]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/check_dataset.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def test_clean_dropped_and_unusable(tmp_path: Path) -> None:
    data = content()
    json_file, images = write(tmp_path, data)
    clean = check("--json", json_file, "--images", images)
    assert (clean.returncode, clean.stderr) == (0, "")
    assert clean.stdout.splitlines() == [
        "set: 3 images (0 without objects), 3 annotations, 1 class; no problems",
        "result: usable",
    ]
    data["annotations"][0]["bbox"] = [5, 5, 0, 0]
    write(tmp_path, data)
    dropped = check("--json", json_file, "--images", images)
    assert dropped.returncode == 0
    assert "box without area  dropped" in dropped.stdout
    strict = check("--json", json_file, "--images", images, "--strict")
    assert strict.returncode == 2
    assert "refused" in strict.stdout
    (Path(images) / "2.png").write_bytes(b"")
    unusable = check("--json", json_file, "--images", images)
    assert unusable.returncode == 2
    assert "2.png: is empty (0 bytes)" in unusable.stdout
    assert "result: can't be used" in unusable.stdout


def test_the_pairs_that_a_mirror_swaps(tmp_path: Path) -> None:
    def line(names: list[str], **category: object) -> str:
        data = content()
        data["categories"] = [{"id": 1, "name": "person", "keypoints": names, **category}]
        json_file, images = write(tmp_path, data)
        return check("--json", json_file, "--images", images).stdout.splitlines()[1]

    assert line(["tail", "l_eye", "r_eye", "LHip", "RHip"]) == (
        "5 keypoints; a mirror swaps l_eye and r_eye, LHip and RHip"
    )
    assert (
        line(["1", "2"]) == "2 keypoints; a mirror swaps none (if it swaps any, give the category flip_pairs)"
    )
    assert line(["1", "2"], flip_pairs=[]) == "2 keypoints; a mirror swaps none"


@pytest.mark.parametrize(
    "arguments", [[], ["--json", "a.json"], ["no_such_set"], ["--json", "/no/x.json", "--images", "/"]]
)
def test_wrong_use_is_one_line_and_2(arguments: list[str]) -> None:
    result = check(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "error: " in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
