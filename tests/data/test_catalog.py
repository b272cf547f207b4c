"""Names of datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from zenith_det.data import dataset_source, load_coco_dataset, register_coco_dataset
from zenith_det.data.catalog import ROOT_VARIABLE, _registered
from zenith_det.data.statistics import STATISTICS_FILE, InputSize, count_set, find_sets_again, to_json
from zenith_det.data.synthetic import generate
from zenith_det.errors import DatasetError, MissingDatasetError


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zenith_det.data.catalog._registered", dict(_registered))


@pytest.mark.parametrize(
    ("name", "json_file", "images"),
    [
        ("coco_2017_train", "instances_train2017.json", "train2017"),
        ("coco_2017_val", "instances_val2017.json", "val2017"),
        ("coco_2017_val_100", "instances_val2017_100.json", "val2017"),
        ("coco_2017_test-dev", "image_info_test-dev2017.json", "test2017"),
        ("coco_2014_minival", "instances_minival2014.json", "val2014"),
        ("coco_2014_valminusminival", "instances_valminusminival2014.json", "val2014"),
        ("keypoints_coco_2017_train", "person_keypoints_train2017.json", "train2017"),
        ("keypoints_coco_2017_val_100", "person_keypoints_val2017_100.json", "val2017"),
        ("keypoints_coco_2014_val", "person_keypoints_val2014.json", "val2014"),
    ],
)
def test_builtin_names_lie_where_detectron2_has_them(
    name: str, json_file: str, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    assert dataset_source(name) == (f"/data/coco/annotations/{json_file}", f"/data/coco/{images}")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert dataset_source(name)[1] == f"datasets/coco/{images}"


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(DatasetError, match="did you mean 'coco_2017_val'"):
        dataset_source("coco_2017_vall")


def test_registered_name() -> None:
    register_coco_dataset("mine", "a.json", "images")
    register_coco_dataset("mine", "a.json", "images")
    assert dataset_source("mine") == ("a.json", "images")
    for name in ("mine", "coco_2017_val"):
        with pytest.raises(DatasetError, match="already registered"):
            register_coco_dataset(name, "b.json", "images")


def test_builtin_set_that_is_not_there_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "/nowhere")
    with pytest.raises(
        DatasetError, match=r"/nowhere/coco/annotations/\S+ does not exist.*DETECTRON2_DATASETS is"
    ):
        load_coco_dataset("coco_2017_val")


@pytest.mark.parametrize("name", ["voc_2007_trainval", "lvis_v1_train", "cityscapes_fine_instance_seg_train"])
def test_a_set_that_detectron2_alone_reads(name: str) -> None:
    with pytest.raises(
        DatasetError, match=rf"{name}' is one of Detectron2's.* --train-json and --train-images"
    ):
        dataset_source(name)


def test_a_run_s_sets_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named below the default root, datasets/ in the working directory."""
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    monkeypatch.setattr("zenith_det.data.catalog._found_before", {})
    generate(tmp_path / "datasets/shapes", train=2, val=1, size=64, seed=5)
    monkeypatch.chdir(tmp_path)
    dataset = load_coco_dataset("shapes_val")
    one = count_set(dataset.metadata, dataset.records, InputSize(0, 0))
    (tmp_path / STATISTICS_FILE).write_text(to_json([one], []))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(MissingDatasetError):
        load_coco_dataset("shapes_val")
    find_sets_again(tmp_path)
    assert load_coco_dataset("shapes_val") == dataset
    # What is there now comes first.
    generate(tmp_path / "elsewhere/datasets/shapes", train=2, val=1, size=64, seed=6)
    assert load_coco_dataset("shapes_val").metadata.json_file.startswith(str(tmp_path / "elsewhere"))
