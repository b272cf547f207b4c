"""tools/check_dataset.py: the table, and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.tools.called import called
from zenith_det.commands import check_dataset

from .builders import content, write

ROOT = Path(__file__).resolve().parents[2]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return called(check_dataset.main, *arguments)


def test_clean_dropped_and_unusable(tmp_path: Path) -> None:
    data = content()
    json_file, images = write(tmp_path, data)
    clean = check("--json", json_file, "--images", images)
    assert (clean.returncode, clean.stderr) == (0, "")
    lines = clean.stdout.splitlines()
    assert lines[:2] == [
        "set: 3 images (0 without objects), 3 annotations, 1 class; no problems",
        "result: usable",
    ]
    # 10 x 10 pixels of 30 x 40, the shorter side brought to INPUT's default, 800.
    assert lines[5].split() == ["all", "3", "3", "267", "px", "0%", "0%", "3"]
    data["annotations"][0] |= {"bbox": [5, 5, 0, 0], "segmentation": []}
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


def test_training_and_validation_side_by_side_with_pictures(tmp_path: Path) -> None:
    data = content()
    data["categories"].append({"id": 2, "name": "circle"})
    train = write(tmp_path / "train", data, "_annotations.coco.json")
    data["annotations"][0]["category_id"] = 2
    (tmp_path / "my.yaml").write_text("INPUT:\n  MIN_SIZE_TRAIN: (30,)\n  MIN_SIZE_TEST: 15\n")
    del data["info"], data["licenses"]
    valid = write(tmp_path / "valid", data, "_annotations.coco.json")
    found = tmp_path / "found"
    flags = [
        "--train-json",
        train[0],
        "--train-images",
        train[1],
        "--val-json",
        valid[0],
        "--val-images",
        valid[1],
    ]
    result = check(*flags, "--config-file", str(tmp_path / "my.yaml"), "--pictures", str(found))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("; no problems\n") == 2
    lines = result.stdout.splitlines()
    assert lines[5].split() == ["training:", "train", "validation:", "valid"]
    square = next(line for line in lines if line.startswith("square"))
    assert square.split() == [
        "square",
        "3",
        "3",
        "10",
        "px",
        "0%",
        "0%",
        "3",
        "2",
        "2",
        "5",
        "px",
        "0%",
        "100%",
        "2",
    ]
    assert (
        "AP of circle can only be 0: validation: valid has 1 object of it, no training set has any" in lines
    )
    page = (found / "dataset.html").read_text()
    assert "AP of circle can only be 0" in page
    assert page.count("<img ") == 6
    for name in ("classes", "sizes", "labelled_training", "labelled_validation"):
        with Image.open(found / f"{name}.png") as picture:
            assert min(picture.size) > 200


def test_a_folder_is_checked_with_all_of_its_parts(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        data = content()
        if part == "test":
            data["annotations"][0]["category_id"] = 9
        _, images = write(tmp_path / part, data, "_annotations.coco.json")
        for image in Path(images).iterdir():  # beside their file, as Roboflow has them
            image.rename(tmp_path / part / image.name)
    result = check(str(tmp_path), "--fast")
    assert (result.returncode, result.stderr) == (2, "")  # for the test set
    name = tmp_path.name
    for part, verdict in (
        ("train", "usable"),
        ("val", "usable"),
        ("test", "can't be used: unknown category"),
    ):
        assert f"{name} {part}: 3 images" in result.stdout
        assert result.stdout.split(f"{name} {part}: 3 images")[1].split("result: ")[1].startswith(verdict)
    assert f"training: {name} train" in result.stdout
    assert "Traceback" not in check(str(tmp_path / "train" / "images"), "--fast").stderr


def test_some_images_may_be_missing(tmp_path: Path) -> None:
    json_file, images = write(tmp_path, content())
    (Path(images) / "2.png").unlink()
    refused = check("--json", json_file, "--images", images)
    assert refused.returncode == 2
    told = f"1 of 3 images is missing in {images}: 2.png; DATASETS.MAX_BAD_IMAGES 1 (--max-bad-images 1) does without"
    assert told in refused.stdout
    assert check("--json", json_file, "--images", images, "--max-bad-images", "1").returncode == 0


def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    json_file, images = write(tmp_path, content())
    for flags in (
        ["--json", json_file, "--images", images, "--fast"],
        ["--json", "/no", "--images", "/"],
    ):
        tool = [sys.executable, str(ROOT / "tools/check_dataset.py"), *flags]
        process = subprocess.Popen(
            tool, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read().decode()
        assert "Broken" not in told
        assert "Traceback" not in told
        assert process.wait() == (2 if "/no" in flags else 141)
