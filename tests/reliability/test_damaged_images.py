"""Images whose header is good and whose pixels can't be decoded: the check before a run lets them pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import SmallSet
from tests.engines.torchvision_engine.small_models import small_config, training_set
from tests.reliability import runs
from zenith_det.data import ImageError, load_coco_dataset
from zenith_det.data.synthetic import split_files
from zenith_det.engines.batches import TestDataset, build_train_loader, one_by_one
from zenith_det.engines.torchvision_engine.input_pipeline import TestMapper, TrainingMapper
from zenith_det.errors import DatasetError


def damage(path: Path) -> None:
    """Overwrite the middle of a PNG: header, size and end mark stay."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)


def damaged_copy(data: Path, folder: Path, split: str, images: int | None = None) -> tuple[Path, list[str]]:
    """A copy of a set in which the first ``images`` images (default: all) of a split are damaged; their paths."""
    shutil.copytree(data, folder)
    json_file, root = split_files(folder, split, "instances")
    listed = sorted(json.loads(Path(json_file).read_text())["images"], key=lambda image: image["id"])
    paths = [Path(root, image["file_name"]) for image in listed[:images]]
    for path in paths:
        damage(path)
    return folder, list(map(str, paths))


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_loader_workers_error_is_one_line(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    copy, (path,) = damaged_copy(data, tmp_path / "data", "val", images=1)
    words = runs.arguments(engine, copy, tmp_path / "out", SOLVER__MAX_ITER=40, TEST__EVAL_PERIOD=2)
    code, printed = runs.run(words)
    assert code == 2, printed
    (line,) = (line for line in printed.splitlines() if "error: " in line)
    assert line.startswith(f"error: in the evaluation after iteration 1: {path}: can't be decoded: ")
    assert "Traceback" not in printed


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_training_takes_another_image(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    copy, (path,) = damaged_copy(data, tmp_path / "data", "train", images=1)
    words = runs.arguments(engine, copy, tmp_path / "out", SOLVER__MAX_ITER=8, TEST__EVAL_PERIOD=0)
    code, printed = runs.run(words)
    assert code == 0, printed
    assert f"image replaced by the next one in the set: {path}: can't be decoded" in printed


@pytest.mark.parametrize("workers", [0, 1])
def test_the_message_does_not_depend_on_workers(shapes: SmallSet, workers: int, tmp_path: Path) -> None:
    copy, paths = damaged_copy(shapes.root, tmp_path / "data", "train")
    dataset = load_coco_dataset(split_files(copy, "train", "instances"))
    cfg = small_config("mask", DATALOADER__NUM_WORKERS=workers, SOLVER__IMS_PER_BATCH=1).cfg
    with pytest.raises(ImageError) as caught:
        next(iter(one_by_one(cfg, TestDataset(dataset.records, TestMapper(cfg)), range(1))))
    assert str(caught.value).startswith(f"{paths[0]}: can't be decoded: ")
    assert "Traceback" not in str(caught.value)
    mapper = TrainingMapper(cfg, dataset.metadata)
    with pytest.raises(DatasetError, match=r"^10 images in a row could not be read, from .*\.png backwards"):
        next(iter(build_train_loader(cfg, training_set(dataset), mapper, seed=1, start=0)))


class Buggy(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise ValueError("a bug")


def test_errors_of_others_keep_their_traceback() -> None:
    """A worker's own bug is not made a mistake of the user."""
    with pytest.raises(ValueError, match=r"Traceback[\s\S]*a bug"):
        next(iter(torch.utils.data.DataLoader(Buggy(), num_workers=1)))
