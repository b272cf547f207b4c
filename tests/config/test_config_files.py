"""Every file under configs/ loads, here and in Detectron2, and says what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from zenith_det.config import add_zenith_config, follow_dataset, load_config, zenith_unused_keys
from zenith_det.config.defaults import MOVED_KEYS
from zenith_det.config.keys import leaves

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RECIPES = [file for file in FILES if not file.name.startswith("Base-")]
TASKS = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn")
BASELINES = {
    "sgd_step": ("SGD", "WarmupMultiStepLR", 0.02),
    "sgd_cosine": ("SGD", "WarmupCosineLR", 0.02),
    "adamw": ("AdamW", "WarmupMultiStepLR", 0.0001),
    "schedule_free": ("ScheduleFreeSGD", "WarmupConstantLR", 0.2),
    "prodigy": ("Prodigy", "WarmupCosineLR", 1.0),
}


def name_of(file: Path) -> str:
    return str(file.relative_to(CONFIGS))


def test_every_promised_file_is_there() -> None:
    names = {name_of(file) for file in RECIPES}
    assert {f"{task}_zenith.yaml" for task in TASKS} <= names
    assert {
        f"quickstart/{task}_{kind}.yaml" for task in TASKS for kind in ("zenith", "zenith_adamw")
    } <= names
    assert {f"baselines/{task}_{baseline}.yaml" for task in TASKS for baseline in BASELINES} <= names


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_it_loads_and_sets_nothing_in_vain(file: Path) -> None:
    loaded = load_config(str(file))
    assert loaded.sources
    assert zenith_unused_keys(loaded.sources, loaded.cfg) == []


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_it_is_the_task_in_its_name(file: Path) -> None:
    cfg = load_config(str(file)).cfg
    assert file.name.startswith("mask") == cfg.MODEL.MASK_ON
    assert file.name.startswith("keypoint") == cfg.MODEL.KEYPOINT_ON
    if "coco_2017" in str(cfg.DATASETS.TRAIN):
        assert ("keypoints_coco_2017_train" in cfg.DATASETS.TRAIN) == cfg.MODEL.KEYPOINT_ON
    kind = {"_zenith": "ZENITH", "_zenith_adamw": "ZENITHAdamW"}.get(file.stem.partition("_rcnn")[2])
    if kind:
        assert kind == cfg.SOLVER.OPTIMIZER
        assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupZenithLR"


@pytest.mark.parametrize("task", TASKS)
def test_baselines_differ_from_zenith_in_the_solver_only(task: str) -> None:
    zenith = dict(leaves(load_config(str(CONFIGS / f"{task}_zenith.yaml")).cfg))
    assert (zenith["SOLVER.BASE_LR"], zenith["SOLVER.MAX_ITER"], zenith["SOLVER.IMS_PER_BATCH"]) == (
        0.02,
        90000,
        16,
    )
    for baseline, expected in BASELINES.items():
        cfg = dict(leaves(load_config(str(CONFIGS / "baselines" / f"{task}_{baseline}.yaml")).cfg))
        names = ("SOLVER.OPTIMIZER", "SOLVER.LR_SCHEDULER_NAME", "SOLVER.BASE_LR")
        assert tuple(cfg[name] for name in names) == expected
        changed = {key for key in cfg if cfg[key] != zenith[key]}
        allowed = {*names, "SOLVER.STEPS", "SOLVER.WEIGHT_DECAY", "SOLVER.AVERAGE.KIND"}
        assert changed <= allowed, baseline


@pytest.mark.detectron2
@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_detectron2_loads_it_unchanged(file: Path) -> None:
    detectron2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    theirs = detectron2.get_cfg()
    add_zenith_config(theirs)
    theirs.merge_from_file(str(file), allow_unsafe=False)
    read = dict(leaves(theirs))
    assert [read.pop(old) for old in MOVED_KEYS] == [None] * len(MOVED_KEYS)  # there for files that use them
    assert read == dict(leaves(load_config(str(file)).cfg))


@pytest.mark.detectron2
@pytest.mark.parametrize("task", TASKS)
def test_sgd_step_is_detectron2s_own_1x_recipe(task: str) -> None:
    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="Detectron2's model zoo can't be imported")
    folder = {"faster_rcnn": "Detection", "mask_rcnn": "InstanceSegmentation", "keypoint_rcnn": "Keypoints"}[
        task
    ]
    theirs = dict(leaves(model_zoo.get_config(f"COCO-{folder}/{task}_R_50_FPN_1x.yaml")))
    loaded = load_config(str(CONFIGS / "baselines" / f"{task}_sgd_step.yaml"))
    follow_dataset(loaded, "COCO", 1 if task == "keypoint_rcnn" else 80, 17)
    loaded.cfg.MODEL.RETINANET.NUM_CLASSES = 80
    ours = dict(leaves(loaded.cfg))
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.detectron2
def test_every_config_of_detectron2s_model_zoo_loads_as_it_does_there() -> None:
    detectron2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="Detectron2's model zoo can't be imported")
    root = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent
    files = sorted(root.rglob("*.yaml"))
    assert len(files) > 80
    for file in files:
        theirs = detectron2.get_cfg()
        theirs.merge_from_file(str(file))
        ours = dict(leaves(load_config(str(file)).cfg))
        assert {key: ours[key] for key, _ in leaves(theirs)} == dict(leaves(theirs)), file
