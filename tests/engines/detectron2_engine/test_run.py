"""Whole runs by tools/train_net.py's road: boxes, masks, keypoints, one's own files, what is told."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from tests.conftest import ROOT
from tests.engines.detectron2_engine.d2_helpers import (
    forget,
    log_lines,
    metrics,
    rcnn_opts,
    read_sets,
    synthetic_set,
)
from zenith_det.commands import train
from zenith_det.config import LoadedConfig, add_zenith_config, name_of_files
from zenith_det.data import catalog, load_coco_dataset, register_coco_dataset
from zenith_det.engines import run as whole_run
from zenith_det.engines.detectron2_engine import load_config_file
from zenith_det.engines.detectron2_engine.config import to_detectron2
from zenith_det.engines.detectron2_engine.data import (
    CocoMapper,
    checked_dataset,
    mapper_for,
)
from zenith_det.engines.detectron2_engine.evaluation import CocoEvaluator, build_evaluator
from zenith_det.engines.device import resolve_device
from zenith_det.engines.engine import TestSet, load_engine
from zenith_det.engines.evaluating import evaluate
from zenith_det.engines.options import RunOptions
from zenith_det.errors import CheckpointError, ConfigError, DatasetError, TrainingDivergedError

pytestmark = pytest.mark.detectron2

run = functools.partial(whole_run.run, "detectron2")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_set(tmp_path_factory.mktemp("shapes"), train=8, val=4)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_set(tmp_path_factory.mktemp("figures"), task="keypoints", train=8, val=4)


def data_keys(files: Any) -> dict[str, str]:
    return {
        "DATASETS__TRAIN_JSON": str(files["train"].json_file),
        "DATASETS__TRAIN_IMAGES": str(files["train"].image_root),
        "DATASETS__VAL_JSON": str(files["val"].json_file),
        "DATASETS__VAL_IMAGES": str(files["val"].image_root),
    }


def load(output: Path, files: Any, **more: Any) -> LoadedConfig:
    keys = {**data_keys(files), "OUTPUT_DIR": str(output), "SOLVER__MAX_ITER": 2, **more}
    return load_config_file("", rcnn_opts(**keys))


def load_zoo(name: str, output: Path, files: Any, **more: Any) -> LoadedConfig:
    """A model-zoo config, made small enough for a test by typed keys."""
    small = dict(zip(*[iter(rcnn_opts())] * 2))
    kept = ("MODEL.DEVICE", "SOLVER", "INPUT", "SEED", "DATALOADER", "MODEL.RPN.P", "MODEL.ROI_HEADS.B")
    keys = {key.replace(".", "__"): value for key, value in small.items() if key.startswith(kept)}
    keys.update(
        {**data_keys(files), "OUTPUT_DIR": str(output), "SOLVER__MAX_ITER": 1, "MODEL__WEIGHTS": "''"}
    )
    opts = [str(w) for pair in {**keys, **more}.items() for w in (pair[0].replace("__", "."), pair[1])]
    return load_config_file(name, opts, zenith=True)


# ---- the three tasks


@pytest.mark.parametrize(
    ("task", "keys", "metrics_there"),
    [
        ("shapes", {}, {"bbox/AP"}),
        ("shapes", {"MODEL__MASK_ON": True}, {"bbox/AP", "segm/AP"}),
        ("figures", {"MODEL__KEYPOINT_ON": True}, {"bbox/AP", "keypoints/AP"}),
    ],
)
def test_train_evaluate_resume_and_evaluate_again(
    tmp_path: Path, request: pytest.FixtureRequest, task: str, keys: dict[str, Any], metrics_there: set[str]
) -> None:
    files = request.getfixturevalue(task)
    trained = run(load(tmp_path, files, **keys), RunOptions())
    assert metrics_there <= set(trained)
    for name in (
        "config.yaml", "log.txt", "metrics.json", "model_final.pth", "last_checkpoint",
        "inference/coco_instances_results.json", "curves.png", "predictions.png",
    ):  # fmt: skip
        assert (tmp_path / name).exists(), name
    assert list(tmp_path.glob("events.out.tfevents.*"))
    lines = metrics(tmp_path)
    assert lines[0]["lr"] == pytest.approx(lines[0]["zenith/ratio"] * 0.01 * (0.001 + 0.999 / 2))
    assert metrics_there <= set(lines[-1])
    log = (tmp_path / "log.txt").read_text()
    assert "copypaste: Task: bbox" in log
    assert log.count("copypaste: AP,AP50,AP75,APs,APm,APl") == len(metrics_there - {"keypoints/AP"})
    start = r"[78] images, batch 2, 2 iterations = 0.5\d* epochs, ZENITH: eta0 = 0.01, window = 3, device cpu"
    assert re.search(start, log)

    # The run's own config.yaml is enough to evaluate it.
    again = load_config_file(
        str(tmp_path / "config.yaml"),
        ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "eval")],
    )
    assert run(again, RunOptions(eval_only=True)) == pytest.approx(trained, abs=1e-9)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert saved["dataset"]["thing_classes"] == list(
        load_coco_dataset((files["train"].json_file, files["train"].image_root)).metadata.thing_classes
    )
    longer = load_config_file(str(tmp_path / "config.yaml"), ["SOLVER.MAX_ITER", "3"])
    run(longer, RunOptions(resume=True))
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 2


def test_our_ap_is_detectron2s(tmp_path: Path, shapes: Any) -> None:
    """The same detections through our evaluator and Detectron2's own."""
    loaded = load(tmp_path, shapes, MODEL__MASK_ON=True, SOLVER__MAX_ITER=1)
    read_sets(loaded)
    cfg = to_detectron2(loaded)
    name = cfg.DATASETS.TEST[0]
    ours = build_evaluator(cfg, name, str(tmp_path / "ours"))
    assert isinstance(ours, CocoEvaluator)
    theirs = COCOEvaluator(name, output_dir=str(tmp_path / "theirs"), use_fast_impl=False)
    theirs.reset()
    rng = np.random.default_rng(0)
    for record in checked_dataset(name).records:
        # The truth, moved a little, so that AP is neither 0 nor 100.
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in record["annotations"])]
        found = Instances((record["height"], record["width"]))
        found.pred_boxes = Boxes(
            torch.tensor(boxes) + torch.from_numpy(rng.normal(0, 1.5, (len(boxes), 4))).float()
        )
        found.scores = torch.from_numpy(rng.random(len(boxes)))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        masks = torch.zeros(len(boxes), record["height"], record["width"], dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes):
            mask[int(y0) : int(y1), int(x0) : int(x1)] = True
        found.pred_masks = masks
        for evaluator in (ours, theirs):
            evaluator.process([record], [{"instances": found}])
    mine, reference = ours.evaluate(), theirs.evaluate()
    assert list(mine) == list(reference) == ["bbox", "segm"]
    for task, values in reference.items():
        assert 0 < values["AP"] < 100
        for metric, value in values.items():
            assert mine[task][metric] == pytest.approx(value, abs=1e-9, nan_ok=True), metric


def test_more_detections_than_coco_counts_have_one_ap(tmp_path: Path, shapes: Any) -> None:
    """The same 200 detections an image by either engine's evaluation and Detectron2's own."""
    loaded = load(tmp_path, shapes, SOLVER__MAX_ITER=1, TEST__DETECTIONS_PER_IMAGE=300)
    read_sets(loaded)
    cfg = to_detectron2(loaded)
    name = cfg.DATASETS.TEST[0]
    dataset = checked_dataset(name)
    ours, theirs = build_evaluator(cfg, name), COCOEvaluator(name, use_fast_impl=False)
    found: list[dict[str, torch.Tensor]] = []
    rng = np.random.default_rng(0)
    for record in dataset.records:
        annotation = record["annotations"][0]
        x, y, w, h = annotation["bbox"]
        boxes = torch.tensor([x, y, x + w, y + h]) + torch.from_numpy(rng.normal(0, 4, (200, 4))).float()
        classes = torch.full((200,), annotation["category_id"])
        found.append({"boxes": boxes, "scores": torch.from_numpy(rng.random(200)), "classes": classes})
    for evaluator in (ours, theirs):
        evaluator.reset()
        for record, one in zip(dataset.records, found):
            instances = Instances((record["height"], record["width"]))
            instances.pred_boxes, instances.scores = Boxes(one["boxes"]), one["scores"]
            instances.pred_classes = one["classes"]
            evaluator.process([record], [{"instances": instances}])
    images = iter(found)
    values, _ = evaluate(
        load_engine("torchvision"),
        loaded.cfg,
        lambda batch: [next(images) for _ in batch],  # type: ignore[arg-type]
        TestSet(name, dataset),
        tmp_path / "built_in",
    )
    reference = theirs.evaluate()["bbox"]["AP"]
    assert 0 < reference < 100
    assert ours.evaluate()["bbox"]["AP"] == pytest.approx(reference, abs=1e-9)
    assert values["bbox/AP"] == pytest.approx(reference, abs=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    ],
)
def test_other_models_of_the_zoo_train_with_zenith(tmp_path: Path, shapes: Any, name: str) -> None:
    run(load_zoo(name, tmp_path, shapes, TEST__MAX_IMAGES=1), RunOptions())
    assert "zenith/ratio" in metrics(tmp_path)[0]


@pytest.mark.parametrize("name", ["faster_rcnn_zenith", "mask_rcnn_zenith_adamw", "keypoint_rcnn_zenith"])
def test_the_quickstart_configs_train(tmp_path: Path, shapes: Any, figures: Any, name: str) -> None:
    """Their backbone ends before res5, which Detectron2's FPN does not expect."""
    config = ROOT / "configs" / "quickstart" / f"{name}.yaml"
    keys = {
        **data_keys(figures if name.startswith("keypoint") else shapes),
        "OUTPUT_DIR": tmp_path,
        "MODEL__DEVICE": "cpu",
    }
    keys.update(SOLVER__MAX_ITER=2, DATALOADER__NUM_WORKERS=0, TEST__MAX_IMAGES=2)
    opts = [str(word) for key, value in keys.items() for word in (key.replace("__", "."), value)]
    run(load_config_file(str(config), opts), RunOptions())
    assert "zenith/ratio" in metrics(tmp_path)[0]


def test_what_cannot_be_augmented_at_test_time(tmp_path: Path, figures: Any) -> None:
    """Detectron2 itself would tell after the training, with an AssertionError."""
    for key, value, told in (
        ("MODEL.KEYPOINT_ON", True, r"keypoints \(--engine torchvision can\)"),
        ("MODEL.LOAD_PROPOSALS", True, "precomputed proposals"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.META_ARCHITECTURE RetinaNet"),
    ):
        loaded = load(tmp_path, figures)
        loaded.override("TEST.AUG.ENABLED", True)
        loaded.override(key, value)
        with pytest.raises(ConfigError, match=rf"^TEST\.AUG\.ENABLED .* for {told}.*: set it False$"):
            run(loaded, RunOptions())


def test_the_command(tmp_path: Path, shapes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files = data_keys(shapes)
    flags = [
        "--engine", "detectron2",
        "--train-json", files["DATASETS__TRAIN_JSON"], "--train-images", files["DATASETS__TRAIN_IMAGES"],
        "--val-json", files["DATASETS__VAL_JSON"], "--val-images", files["DATASETS__VAL_IMAGES"],
        "--epochs", "0.5",
    ]  # fmt: skip
    assert train.main([*flags, *rcnn_opts(OUTPUT_DIR=tmp_path)]) == 0
    assert "engine: detectron2" in capsys.readouterr().out
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 1
    # A prediction script of Detectron2's, as docs/DETECTRON2.md has it.
    cfg = detectron2_get_cfg()
    add_zenith_config(cfg)
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    found = DefaultPredictor(cfg)(np.zeros((60, 80, 3), np.uint8))["instances"]
    assert found.image_size == (60, 80)


# ---- data


def altered(files: Any, folder: Path, change: Any) -> dict[str, str]:
    """The training annotations, changed by ``change``, as keys."""
    content = json.loads(Path(files["train"].json_file).read_text())
    change(content)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(content))
    return {**data_keys(files), "DATASETS__TRAIN_JSON": str(folder / "train.json")}


def test_built_in_names_are_checked_too(tmp_path: Path, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines leave out the same objects, under Detectron2's names as well."""

    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"][2] = 0
        content["annotations"][0]["segmentation"] = []

    altered(shapes, tmp_path / "coco" / "annotations", spoil)
    (tmp_path / "coco/annotations/train.json").rename(tmp_path / "coco/annotations/instances_train2017.json")
    (tmp_path / "coco/train2017").symlink_to(shapes["train"].image_root)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    loaded = load_config_file("", rcnn_opts(DATASETS__TRAIN="('coco_2017_train',)", DATASETS__TEST="()"))
    known, reader = MetadataCatalog.get("coco_2017_train").as_dict(), DatasetCatalog["coco_2017_train"]
    try:
        read_sets(loaded)
        in_detectron2 = DatasetCatalog.get("coco_2017_train")
        ours = load_coco_dataset("coco_2017_train")
        assert in_detectron2 == ours.records
        assert ours.report.count("dropped") == 1
        assert ours.metadata.num_classes == loaded.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        assert MetadataCatalog.get("coco_2017_train").thing_classes == list(ours.metadata.thing_classes)
    finally:
        # As Detectron2 had it, for other tests.
        forget("coco_2017_train")
        DatasetCatalog.register("coco_2017_train", reader)
        MetadataCatalog.get("coco_2017_train").set(**{k: v for k, v in known.items() if k != "name"})


def test_masks_of_every_kind_in_one_file_train(tmp_path: Path, shapes: Any) -> None:
    """Polygons, RLE and missing masks mixed."""

    def mix(content: dict[str, Any]) -> None:
        for number, annotation in enumerate(content["annotations"]):
            x, y, w, h = annotation["bbox"]
            if number % 3 == 0:
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            elif number % 3 == 1:
                annotation.pop("segmentation", None)

    keys = altered(shapes, tmp_path, mix)
    loaded = load(
        tmp_path / "out", shapes, **{**keys, "MODEL__MASK_ON": True, "INPUT__MASK_FORMAT": "polygon"}
    )
    with pytest.raises(
        ConfigError, match=r"INPUT.MASK_FORMAT is 'polygon', but \d+ objects .* take 'bitmask'"
    ):
        read_sets(loaded)
    loaded = load(tmp_path / "out", shapes, **{**keys, "MODEL__MASK_ON": True})
    assert "segm/AP" in run(loaded, RunOptions())

    def no_masks(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation.pop("segmentation", None)

    keys = altered(shapes, tmp_path / "none", no_masks)
    with pytest.raises(ConfigError, match=r"MODEL.MASK_ON is True, but no object of .* has a mask"):
        read_sets(load(tmp_path, shapes, **{**keys, "MODEL__MASK_ON": True}))


def test_runs_in_a_second_training_set_make_the_masks_bitmaps(
    tmp_path: Path, shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def polygons(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]

    monkeypatch.setattr(catalog, "_registered", dict(catalog._registered))
    outlines = altered(shapes, tmp_path, polygons)
    register_coco_dataset("outlines", outlines["DATASETS__TRAIN_JSON"], outlines["DATASETS__TRAIN_IMAGES"])
    register_coco_dataset("runs", shapes["train"].json_file, shapes["train"].image_root)
    for name in ("outlines", "runs"):
        forget(name)
    opts = rcnn_opts(DATASETS__TRAIN="('outlines', 'runs')", MODEL__MASK_ON=True, OUTPUT_DIR=tmp_path / "out")
    loaded = load_config_file("", opts)
    read_sets(loaded)
    assert loaded.cfg.INPUT.MASK_FORMAT == "bitmask"


def test_keypoints_wanted_and_none_labelled(tmp_path: Path, figures: Any) -> None:
    def unlabel(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation["keypoints"][2::3] = [0] * (len(annotation["keypoints"]) // 3)

    keys = altered(figures, tmp_path, unlabel)
    loaded = load(tmp_path / "out", figures, **{**keys, "MODEL__KEYPOINT_ON": True})
    with pytest.raises(
        ConfigError, match=r"KEYPOINT_ON is True, but no object of .* has a labelled keypoint"
    ):
        run(loaded, RunOptions())


def test_keypoints_of_which_no_pair_is_known_are_warned_of_once(tmp_path: Path, figures: Any) -> None:
    def number(content: dict[str, Any]) -> None:
        category = content["categories"][0]
        category["keypoints"] = [str(i) for i in range(len(category["keypoints"]))]

    keys = altered(figures, tmp_path, number)
    run(load(tmp_path / "out", figures, **{**keys, "MODEL__KEYPOINT_ON": True}), RunOptions())
    assert (tmp_path / "out" / "log.txt").read_text().count("give the category flip_pairs") == 1


def test_one_file_with_two_image_folders_is_two_sets(tmp_path: Path, shapes: Any) -> None:
    """As one labels pictures and has them again, degraded, to evaluate on."""
    degraded = shutil.copytree(shapes["train"].image_root, tmp_path / "degraded")
    keys = data_keys(shapes) | {
        "DATASETS__VAL_JSON": str(shapes["train"].json_file),
        "DATASETS__VAL_IMAGES": str(degraded),
    }
    loaded = load(tmp_path / "out", shapes, **keys)
    read_sets(loaded)
    folders = []
    for names in (loaded.cfg.DATASETS.TRAIN, loaded.cfg.DATASETS.TEST):
        folders.append({str(Path(record["file_name"]).parent) for record in DatasetCatalog.get(names[0])})
    assert folders == [{str(shapes["train"].image_root)}, {str(degraded)}]
    assert name_of_files(loaded.cfg, "TRAIN") != name_of_files(loaded.cfg, "TEST") == "degraded"


def test_16_bit_images_are_not_white(tmp_path: Path, shapes: Any) -> None:
    loaded = load(tmp_path, shapes)
    read_sets(loaded)
    cfg = to_detectron2(loaded)
    mapper = mapper_for(cfg, cfg.DATASETS.TRAIN, is_train=False)
    assert isinstance(mapper, CocoMapper)
    deep = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(deep).save(tmp_path / "deep.png")
    record = {"file_name": str(tmp_path / "deep.png"), "height": 64, "width": 64, "image_id": 1}
    assert len(mapper(record)["image"].unique()) > 50
    with pytest.raises(DatasetError, match=r"deep.png is 64x64, the annotation file says 64x63"):
        mapper({**record, "height": 63})


def test_mistakes_are_one_line(tmp_path: Path, shapes: Any, figures: Any) -> None:
    def told(loaded: LoadedConfig, kind: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(kind, match=message) as error:
            run(loaded, RunOptions(**options))
        assert len(str(error.value).splitlines()) == 1

    out = tmp_path / "out"
    told(
        load(out, shapes, MODEL__ROI_HEADS__NUM_CLASSES=3), ConfigError, r"NUM_CLASSES is 3 .* has 6 classes"
    )
    told(load(out, shapes, MODEL__KEYPOINT_ON=True), ConfigError, "has no keypoints")
    told(load(out, shapes, DATASETS__VAL_IMAGES=""), ConfigError, r"go together: give --val-images")
    told(load(out, shapes, SOLVER__OPTIMIZER="SDG"), ConfigError, "'SDG' is not one of")
    told(
        load(out, shapes, SOLVER__CLIP_GRADIENTS__ENABLED=True, MODEL__DEVICE="cuda"),
        ConfigError,
        "no CUDA device",
    )
    told(load(out, shapes), ConfigError, "--eval-only needs MODEL.WEIGHTS", eval_only=True)
    told(load(out, shapes, MODEL__WEIGHTS="no.pth"), CheckpointError, "'no.pth' does not exist")
    named = load(out, shapes, MODEL__WEIGHTS="ResNet50_Weights.IMAGENET1K_V1")
    told(named, ConfigError, r"torchvision's name.*detectron2://ImageNetPretrained")
    torch.save({"model": {}, "engine": "torchvision"}, tmp_path / "other.pth")
    other = load(out, shapes, MODEL__WEIGHTS=str(tmp_path / "other.pth"))
    told(other, CheckpointError, "of the built-in engine: convert it with zenith-det convert-checkpoint")
    told(load(out, shapes, DATASETS__TRAIN_JSON="no.json"), DatasetError, "no.json does not exist")
    empty = altered(shapes, tmp_path, lambda content: content["annotations"].clear())
    told(load(out, shapes, **empty), DatasetError, "no image with objects is left to train on")
    nothing = load_config_file("", rcnn_opts(OUTPUT_DIR=out))
    told(nothing, ConfigError, "DATASETS.TRAIN is empty: .*--train-json")
    unknown = load_config_file("", rcnn_opts(OUTPUT_DIR=out, DATASETS__TRAIN="('coco_2017_trai',)"))
    told(unknown, DatasetError, r"'coco_2017_trai' is unknown: did you mean 'coco_2017_train'")
    told(
        load(out, shapes, SOLVER__BASE_LR=1e30, SOLVER__MAX_ITER=6),
        TrainingDivergedError,
        "training diverged at iteration",
    )


# ---- the device


def test_device_auto_and_amp_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for opts in (["MODEL.DEVICE", "auto"], []):
        loaded = load_config_file("", [*opts, "SOLVER.AMP.ENABLED", "True"])
        with log_lines("zenith_det") as lines:
            resolve_device(loaded)
        assert loaded.cfg.MODEL.DEVICE == "cpu"
        assert not loaded.cfg.SOLVER.AMP.ENABLED
        assert [line.split(":")[0] for line in lines] == [
            "no CUDA device",
            "SOLVER.AMP.ENABLED has no effect on the CPU",
        ]
    with pytest.raises(ConfigError, match=r"MODEL.DEVICE is 'cuda' .command line., but PyTorch sees no CUDA"):
        resolve_device(load_config_file("", ["MODEL.DEVICE", "cuda"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = load_config_file("", ["MODEL.DEVICE", "auto", "SOLVER.AMP.ENABLED", "True"])
    resolve_device(loaded)
    assert (loaded.cfg.MODEL.DEVICE, loaded.cfg.SOLVER.AMP.ENABLED) == ("cuda", True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: Detectron2's AMPTrainer wants CUDA")
@pytest.mark.parametrize("amp", [False, True])
def test_cuda_run(tmp_path: Path, shapes: Any, amp: bool) -> None:
    keys = {
        "MODEL__DEVICE": "cuda",
        "MODEL__MASK_ON": True,
        "SOLVER__MAX_ITER": 4,
        "SOLVER__AMP__ENABLED": amp,
    }
    assert "segm/AP" in run(load(tmp_path, shapes, **keys), RunOptions())
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert bool(saved["scaler"]) == amp
