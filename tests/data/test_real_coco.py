"""Real COCO files, where DETECTRON2_DATASETS has them: as pycocotools and Detectron2 read them."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import pytest
from pycocotools.coco import COCO

from zenith_det.data import (
    CocoDataset,
    coco_ground_truth,
    dataset_source,
    filter_empty,
    filter_few_keypoints,
    load_coco_dataset,
)

NAMES = ["coco_2017_train", "coco_2017_val", "keypoints_coco_2017_train", "keypoints_coco_2017_val"]


@pytest.fixture(scope="module", params=NAMES)
def real(request: pytest.FixtureRequest) -> CocoDataset:
    json_file, image_root = dataset_source(request.param)
    if not (os.path.isfile(json_file) and os.path.isdir(image_root)):
        pytest.skip(f"real COCO is not there: {json_file} (set DETECTRON2_DATASETS)")
    return load_coco_dataset(request.param)


def test_is_what_pycocotools_reads(real: CocoDataset) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(real.metadata.json_file)
    assert len(real.records) == len(coco.imgs)
    truth = {a["id"]: a for a in coco_ground_truth(real)["annotations"]}
    # The full training set has one box without height, which is dropped.
    assert len(coco.anns) - len(truth) == real.report.count("dropped") <= 1
    for annotation_id, ours in truth.items():
        theirs = coco.anns[annotation_id]
        for key in ours.keys() - {"segmentation"}:
            assert ours[key] == theirs[key], (annotation_id, key)
    if len(truth) < 5000:
        for annotation_id, ours in truth.items():
            assert (coco.annToMask(ours) == coco.annToMask(coco.anns[annotation_id])).all()


def test_images_decode(real: CocoDataset) -> None:
    if len(real.records) > 500:
        pytest.skip("the full set takes too long; tools/check_dataset.py does it")
    dataset = load_coco_dataset(real.metadata.name, check_images="full")
    assert not dataset.report.count("stops", "dropped")


def test_keypoint_metadata_is_coco_s(real: CocoDataset) -> None:
    if not real.metadata.name.startswith("keypoints"):
        assert real.metadata.num_keypoints == 0
        assert real.metadata.num_classes == 80
        return
    assert real.metadata.num_keypoints == len(real.metadata.keypoint_oks_sigmas) == 17
    assert real.metadata.keypoint_flip_indices == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    assert len(real.metadata.keypoint_connections) == 19


@pytest.mark.detectron2
def test_records_are_detectron2_s(real: CocoDataset) -> None:
    data = pytest.importorskip("detectron2.data", reason="Detectron2 is not installed")
    from detectron2.data.build import (
        filter_images_with_few_keypoints,
        filter_images_with_only_crowd_annotations,
    )
    from detectron2.data.datasets import load_coco_json

    name = f"{real.metadata.name}_compared"
    theirs = load_coco_json(real.metadata.json_file, real.metadata.image_root, name)
    metadata = data.MetadataCatalog.get(name)
    assert tuple(metadata.thing_classes) == real.metadata.thing_classes
    assert metadata.thing_dataset_id_to_contiguous_id == real.metadata.thing_dataset_id_to_contiguous_id
    builtin = data.MetadataCatalog.get(real.metadata.name)
    if real.metadata.num_keypoints:
        assert tuple(builtin.keypoint_names) == real.metadata.keypoint_names
        assert set(builtin.keypoint_flip_map) == set(real.metadata.keypoint_flip_map)

    def shared(record: dict[str, Any]) -> dict[str, Any]:
        objects = [{k: v for k, v in a.items() if k not in ("id", "area")} for a in record["annotations"]]
        return {**record, "annotations": objects}

    assert [shared(record) for record in real.records] == theirs
    for ours, reference in (
        (filter_empty(real.records), filter_images_with_only_crowd_annotations(theirs)),
        (filter_few_keypoints(real.records, 3), filter_images_with_few_keypoints(theirs, 3)),
    ):
        assert [r["image_id"] for r in ours] == [r["image_id"] for r in reference]
