"""A second start with the same annotation file: the same dataset and reports, without reading it again."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import pwd
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.builders import HEIGHT, SQUARE, WIDTH, content, picture, write
from zenith_det.data import CocoDataset, annotation_cache, coco, images, load_coco_dataset
from zenith_det.data.segmentations import check_rle
from zenith_det.errors import DatasetError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries of these tests go; files of any size are kept."""
    monkeypatch.setenv(annotation_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "SMALLEST", 0)
    return tmp_path / "cache" / "annotations"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The annotation files that were parsed."""
    files: list[str] = []
    parse = coco.parse

    def counting(data: bytes, json_file: str) -> Any:
        files.append(json_file)
        return parse(data, json_file)

    monkeypatch.setattr(coco, "parse", counting)
    return files


def all_kinds() -> dict[str, Any]:
    """A set with everything that records hold, and several things wrong with it."""
    data = content()
    runs = [5 * HEIGHT + 5, 10, WIDTH * HEIGHT - 5 * HEIGHT - 15]
    keypoints = {"keypoints": ["left_end", "right_end"], "skeleton": [[1, 2]], "sigmas": [0.1, 0.2]}
    data["categories"] = [{"id": 9, "name": "café", **keypoints}, {"id": 4, "name": "square"}]
    first, second, third = data["annotations"]
    first |= {
        "category_id": 9,
        "keypoints": [5, 5, 2, 15.5, 15, 1],
        "segmentation": [[5, 5, 15, 5.0, 15, 15]],
    }
    second |= {"category_id": 4, "iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs}}
    text = check_rle({"size": [HEIGHT, WIDTH], "counts": runs}, HEIGHT, WIDTH)["counts"].decode()
    third |= {"category_id": 4, "segmentation": {"size": [HEIGHT, WIDTH], "counts": text}, "area": 12.25}
    data["annotations"] += [
        {"id": 10, "image_id": 1, "category_id": 4, "bbox": [0, 0, 0, 5]},
        {"id": 11, "image_id": 1, "category_id": 4, "bbox": [30, 20, 20, 20], "segmentation": [SQUARE]},
        {"image_id": 2, "category_id": 9, "bbox": [1, 2, 3, 4]},
    ]
    del data["images"][1]["height"], data["images"][1]["width"], data["info"]
    return data


def read(source: tuple[str, str], **options: Any) -> CocoDataset:
    return load_coco_dataset(source, cache=True, **options)


def types_of(value: Any) -> Any:
    """The value with its types: 5 is not 5.0, nor text bytes."""
    if isinstance(value, dict):
        return {key: types_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [types_of(item) for item in value]
    return type(value), value


def test_the_same_dataset_and_the_same_reports(
    tmp_path: Path, parsed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path, all_kinds())
    with caplog.at_level(logging.WARNING):
        first = read(source)
        warned = caplog.messages.copy()
        caplog.clear()
        second = read(source)
    assert len(parsed) == 1
    assert second == first
    assert types_of(second.records) == types_of(first.records)
    assert second.report.count("dropped") == 1
    assert caplog.messages == warned
    assert len(warned) == 1
    unlabelled = [
        a["keypoints"] for r in second.records for a in r["annotations"] if not any(a["keypoints"][2::3])
    ]
    assert len({id(keypoints) for keypoints in unlabelled}) == 1


def test_strictness_and_names_are_not_remembered(tmp_path: Path, parsed: list[str]) -> None:
    source = write(tmp_path, all_kinds())
    read(source)
    with pytest.raises(DatasetError, match="is refused by the strict check: box without area 1"):
        read(source, strict=True)
    assert read(source, name="mine").metadata.name == "mine"
    assert len(parsed) == 1


def test_classes_of_the_training_set_in_another_order(tmp_path: Path, parsed: list[str]) -> None:
    source = write(tmp_path, all_kinds())
    read(source)
    other = read(source, classes=["café", "square"])
    assert len(parsed) == 1
    assert other == load_coco_dataset(source, classes=["café", "square"])
    with pytest.raises(
        DatasetError, match="it has 2 annotations of café, which the training set does not have"
    ):
        read(source, classes=["square", "circle"])


def test_another_file_or_another_place_is_read(tmp_path: Path, parsed: list[str]) -> None:
    read(write(tmp_path, content()))
    changed = content()
    changed["annotations"][0]["bbox"][0] = 6
    assert read(write(tmp_path, changed)).records[0]["annotations"][0]["bbox"][0] == 6
    elsewhere = read(write(tmp_path / "moved", content()))
    assert str(tmp_path / "moved") in elsewhere.records[0]["file_name"]
    assert len(parsed) == 3


@pytest.mark.parametrize("harm", ["missing", "other size"])
@pytest.mark.parametrize("allowed", [0, 1])
def test_an_image_that_changed_since_is_found(tmp_path: Path, harm: str, allowed: int) -> None:
    source = write(tmp_path, all_kinds())
    read(source)
    image = tmp_path / "images" / "3.png"
    image.unlink()
    if harm == "other size":
        picture(HEIGHT + 1, WIDTH).save(image)
    for _ in range(2):
        if allowed:
            assert [r["image_id"] for r in read(source, max_bad_images=1).records] == [1, 2]
        else:
            with pytest.raises(
                DatasetError,
                match="1 of 3 images is missing in" if harm == "missing" else "wrong image size 1",
            ):
                read(source)


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[:200] + b"?" + data[201:],
        lambda data: b"",
        lambda data: pickle.dumps({"records": []}),
    ],
)
def test_a_damaged_entry_is_told_and_mended(
    tmp_path: Path,
    folder: Path,
    parsed: list[str],
    harm: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = write(tmp_path, all_kinds())
    first = read(source)
    (entry,) = folder.iterdir()
    entry.write_bytes(harm(entry.read_bytes()))
    caplog.clear()
    assert read(source) == first
    assert "is damaged: the annotation file itself is read again" in caplog.text
    assert read(source) == first
    assert len(parsed) == 2


def test_an_entry_of_another_form_is_told(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path, content())
    digest = annotation_cache.digest_of(Path(source[0]).read_bytes())
    annotation_cache.Entry(digest, source[1], images.max_pixels(), "auto").write(
        {"categories": [{"id": 1, "name": "square"}]}
    )
    assert len(read(source).records) == 3
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("what", ["entry", "folder"])
def test_what_others_can_write_to_is_not_used(
    what: str, tmp_path: Path, folder: Path, parsed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path, content())
    first = read(source)
    (entry,) = folder.iterdir()
    (entry if what == "entry" else folder).chmod(0o777)
    assert read(source) == first
    assert len(parsed) == 2
    assert f"others can write to {folder}: it is not used" in caplog.text


def test_a_user_without_a_home_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: list[str]
) -> None:
    def unknown(user: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in (annotation_cache.FOLDER_VARIABLE, "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    source = write(tmp_path, content())
    assert read(source) == read(source)
    assert len(parsed) == 2


@pytest.mark.skipif(
    os.geteuid() == 0, reason="root may write everywhere: a file in the folder's place stands in"
)
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.joinpath("cache").mkdir(mode=0o500)
    assert len(read(write(tmp_path, content())).records) == 3


def test_a_file_where_the_folder_should_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.joinpath("cache").write_text("")
    with caplog.at_level(logging.DEBUG, logger=annotation_cache.logger.name):
        assert len(read(write(tmp_path, content())).records) == 3
    assert "cache of annotation files" in caplog.text
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_small_files_and_wrong_ones_leave_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatasetError, match="not valid JSON"):
        read(write(tmp_path, "{"))
    with pytest.raises(DatasetError, match="unknown category id"):
        read(write(tmp_path, content() | {"categories": [{"id": 7, "name": "x"}]}))
    monkeypatch.setattr(annotation_cache, "SMALLEST", 2**20)
    read(write(tmp_path, content()))
    assert not folder.exists()


def test_the_folder_stays_small(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_cache, "MOST_ENTRIES", 2)
    sources = [write(tmp_path, content() | {"info": number}, f"{number}.json") for number in range(3)]
    read(sources[0])
    (first,) = folder.iterdir()
    stale = folder / "left.part"
    stale.touch()
    os.utime(stale, (0, 0))
    read(sources[1])
    for path in folder.iterdir():
        os.utime(path, (time.time() - 100, time.time() - 100))
    read(sources[0])  # used again: the other one goes
    read(sources[2])
    assert first in folder.iterdir()
    assert len(list(folder.iterdir())) == 2


def read_often(source: tuple[str, str]) -> None:
    annotation_cache.SMALLEST = 0
    expected = json.dumps(load_coco_dataset(source).records)
    for _ in range(20):
        assert json.dumps(read(source).records) == expected
        for path in Path(os.environ[annotation_cache.FOLDER_VARIABLE]).rglob("*.json"):
            path.unlink(missing_ok=True)


def test_processes_at_once(tmp_path: Path) -> None:
    source = write(tmp_path, content())
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_often, args=(source,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
