"""One model, two engines: the same weights and images give what the real Detectron2 gives."""

from __future__ import annotations

import copy
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from tests.conftest import ROOT, SmallSet
from tests.engines.torchvision_engine.small_models import training_set

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image as read_detectron2_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.utils.events import EventStorage

from zenith_det.commands import convert_checkpoint
from zenith_det.config import LoadedConfig, add_zenith_config, load_config
from zenith_det.data import CocoDataset, filter_empty, load_coco_dataset, read_image
from zenith_det.engines.batches import build_train_loader
from zenith_det.engines.detectron2_engine.data import CocoMapper
from zenith_det.engines.detectron2_engine.models import connect_top_level, skip_missing_masks
from zenith_det.engines.engine import load_engine
from zenith_det.engines.torchvision_engine import conversion
from zenith_det.engines.torchvision_engine.input_pipeline import TestMapper, TrainingMapper
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.engines.torchvision_engine.tta import RCNNWithTTA
from zenith_det.training.checkpoints.weights import read_weights

pytestmark = pytest.mark.detectron2

TASKS = ["faster", "mask", "keypoint"]
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (32, 32),
    "SOLVER.IMS_PER_BATCH": 4,
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.02,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MIN_SIZE_TEST": 96,
}


def configs(task: str, dataset: CocoDataset, **overrides: Any) -> tuple[LoadedConfig, Any]:
    """Ours and Detectron2's configuration of the same quickstart file."""
    path = f"{ROOT}/configs/quickstart/{task}_rcnn_zenith.yaml"
    values = SMALL | {"MODEL.ROI_HEADS.NUM_CLASSES": dataset.metadata.num_classes} | overrides
    opts = [item for pair in values.items() for item in pair]
    theirs = detectron2_get_cfg()
    add_zenith_config(theirs)
    theirs.merge_from_file(path)
    theirs.merge_from_list(opts)
    return load_config(path, opts), theirs


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dataset(task: str, request: pytest.FixtureRequest) -> CocoDataset:
    small: SmallSet = request.getfixturevalue("figures" if task == "keypoint" else "shapes")
    return load_coco_dataset(small.train)


def polygon_records(dataset: CocoDataset) -> list[dict[str, Any]]:
    """Images of polygons alone: Detectron2's mapper takes either format, not a mixture."""
    records = []
    for record in dataset.records:
        things = [a for a in record["annotations"] if not a["iscrowd"]]
        if things and all(isinstance(a.get("segmentation"), list) for a in things):
            records.append(record)
    return records


def detectron2_mapper(cfg: Any, dataset: CocoDataset, train: bool) -> DatasetMapper:
    settings = DatasetMapper.from_config(cfg_without_keypoints(cfg), train)
    settings["use_keypoint"] = cfg.MODEL.KEYPOINT_ON
    if cfg.MODEL.KEYPOINT_ON:
        settings["keypoint_hflip_indices"] = np.array(dataset.metadata.keypoint_flip_indices)
    return DatasetMapper(**settings)


def cfg_without_keypoints(cfg: Any) -> Any:
    # Only so that from_config doesn't look for flip pairs under a registered dataset name.
    plain = cfg.clone()
    plain.MODEL.KEYPOINT_ON = False
    return plain


_trained: dict[str, dict[str, torch.Tensor]] = {}


def trained_pair(task: str, dataset: CocoDataset, **overrides: Any) -> tuple[Any, Any, LoadedConfig, Any]:
    """Our model after a few steps, Detectron2's with the same weights, and both configurations."""
    loaded, theirs_cfg = configs(task, dataset, **overrides)
    torch.manual_seed(0)
    ours = build_model(loaded.cfg)
    if task not in _trained:
        _trained[task] = weights_after_steps(ours, loaded, dataset)
    ours.load_state_dict(_trained[task])
    theirs = build_detectron2_model(theirs_cfg)
    connect_top_level(theirs)
    converted = conversion.to_detectron2(ours.state_dict())
    missing = theirs.load_state_dict(converted, strict=True)
    assert not missing.missing_keys
    return ours, theirs, loaded, theirs_cfg


def weights_after_steps(model: Any, loaded: LoadedConfig, dataset: CocoDataset) -> dict[str, torch.Tensor]:
    """Enough of them for detections that can be told apart."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    loader = build_train_loader(
        loaded.cfg,
        training_set(dataset, filter_empty(dataset.records)),
        TrainingMapper(loaded.cfg, dataset.metadata),
        seed=0,
        start=0,
    )
    for batch in islice(loader, 40):
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def first_of(n: int, **_: Any) -> torch.Tensor:
    return torch.arange(n)


def test_the_same_losses(task: str, dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, loaded, theirs_cfg = trained_pair(task, dataset, **{"INPUT.RANDOM_FLIP": "none"})
    records = polygon_records(dataset)[:4]
    their_mapper = detectron2_mapper(theirs_cfg, dataset, True)
    our_mapper = TrainingMapper(loaded.cfg, dataset.metadata)
    monkeypatch.setattr(torch, "randperm", first_of)  # both sample the first candidates
    with EventStorage(0):
        expected = theirs.train()([their_mapper(r) for r in records])
    losses = ours.train()([our_mapper(r, np.random.default_rng(0)) for r in records])
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("task", ["mask"], indirect=True)
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_the_same_losses_where_objects_have_no_mask(
    task: str, mask_format: str, dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are boxes to find for both, and nothing to the mask head."""
    ours, theirs, loaded, theirs_cfg = trained_pair(
        task, dataset, **{"INPUT.RANDOM_FLIP": "none", "INPUT.MASK_FORMAT": mask_format}
    )
    skip_missing_masks(theirs)
    records = copy.deepcopy([r for r in polygon_records(dataset) if len(r["annotations"]) > 1][:4])
    our_mapper = TrainingMapper(loaded.cfg, dataset.metadata)
    their_mapper = CocoMapper(theirs_cfg, True)
    monkeypatch.setattr(torch, "randperm", first_of)

    def losses() -> tuple[dict[str, float], dict[str, float]]:
        with EventStorage(0):
            expected = theirs.train()([their_mapper(r) for r in records])
        found = ours.train()([our_mapper(r, np.random.default_rng(0)) for r in records])
        return {k: v.item() for k, v in found.items()}, {k: v.item() for k, v in expected.items()}

    before, _ = losses()
    for record in records[1:]:
        del record["annotations"][-1]["segmentation"]
    for annotation in records[0]["annotations"]:
        del annotation["segmentation"]
    found, expected = losses()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["loss_mask"] != pytest.approx(before["loss_mask"], rel=1e-3)
    for name in before.keys() - {"loss_mask"}:
        assert found[name] == pytest.approx(before[name], rel=1e-6), name
    for record in records[1:]:
        record["annotations"] = [a | {"segmentation": None} for a in record["annotations"]]
    found, expected = losses()
    assert (found["loss_mask"], expected["loss_mask"]) == (0, 0)


def test_the_same_detections(task: str, dataset: CocoDataset) -> None:
    ours, theirs, loaded, theirs_cfg = trained_pair(task, dataset)
    records = dataset.records[:6]
    their_mapper = detectron2_mapper(theirs_cfg, dataset, False)
    our_mapper = TestMapper(loaded.cfg)
    compared = 0
    with torch.no_grad():
        for record in records:
            expected = theirs.eval()([their_mapper(record)])[0]["instances"]
            found = ours.eval()([our_mapper(record)])[0]
            compared += compare(expected, found)
    assert compared > 20, "too few detections for the comparison to mean anything"


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("task", ["faster", "mask"], indirect=True)
def test_the_same_detections_with_test_time_augmentation(task: str, flip: bool, dataset: CocoDataset) -> None:
    """Three or six views, the latter more than go through the network together."""
    aug = {"TEST.AUG.MIN_SIZES": (64, 112, 80), "TEST.AUG.MAX_SIZE": 130, "TEST.AUG.FLIP": flip}
    ours, theirs, loaded, theirs_cfg = trained_pair(task, dataset, **aug)
    with_ours = RCNNWithTTA(loaded.cfg, ours.eval())
    with_theirs = GeneralizedRCNNWithTTA(theirs_cfg, theirs.eval())
    compared = 0
    for record in dataset.records[:4]:
        sample = TestMapper(loaded.cfg)(record)
        with torch.no_grad():
            expected = with_theirs([dict(sample)])[0]["instances"]
        (found,) = with_ours([dict(sample)])
        compared += compare(expected, found)
    assert compared > 20, "too few detections for the comparison to mean anything"


@pytest.mark.parametrize("task", ["faster"], indirect=True)
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("L", [110.0], [57.0]),
        ("L", [103.5, 116.3, 123.7], [57.0] * 3),
        ("YUV-BT.601", [0.45, 0, 0], [0.25] * 3),
    ],
)
def test_the_same_in_other_formats(
    task: str,
    name: str,
    mean: list[float],
    std: list[float],
    dataset: CocoDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pixels as Detectron2 reads and resizes them, in training and in use, to the same losses and detections."""
    keys = {"INPUT.FORMAT": name, "MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
    loaded, theirs_cfg = configs(
        task, dataset, **keys, **{"INPUT.RANDOM_FLIP": "none", "INPUT.MIN_SIZE_TRAIN": (72,)}
    )
    torch.manual_seed(0)
    ours, theirs = build_model(loaded.cfg), build_detectron2_model(theirs_cfg)
    connect_top_level(theirs)
    theirs.load_state_dict(conversion.to_detectron2(ours.state_dict()), strict=True)
    records = polygon_records(dataset)[:2]
    for record in records:
        mine = TestMapper(loaded.cfg)(record)["image"]
        pixels = read_detectron2_image(record["file_name"], name)
        resize = ResizeShortestEdge(loaded.cfg.INPUT.MIN_SIZE_TEST, loaded.cfg.INPUT.MAX_SIZE_TEST)
        resized = resize.get_transform(pixels).apply_image(pixels).transpose(2, 0, 1)
        assert torch.equal(mine, torch.as_tensor(resized.astype(mine.numpy().dtype)))
    their_mapper, our_mapper = CocoMapper(theirs_cfg, True), TrainingMapper(loaded.cfg, dataset.metadata)
    monkeypatch.setattr(torch, "randperm", first_of)
    our_samples = [our_mapper(r, np.random.default_rng(0)) for r in records]
    their_samples = [their_mapper(r) for r in records]
    shown = [
        load_engine(engine).shown(loaded.cfg, one[0])[0]
        for engine, one in (("torchvision", our_samples), ("detectron2", their_samples))
    ]
    assert np.array_equal(*shown)
    with EventStorage(0):
        expected = theirs.train()(their_samples)
    losses = ours.train()(our_samples)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-4, abs=1e-6
    )
    with torch.no_grad():
        (found,) = theirs.eval()([CocoMapper(theirs_cfg, False)(records[0])])
        (mine,) = ours.eval()([TestMapper(loaded.cfg)(records[0])])
        pixels = read_image(records[0]["file_name"], name)
        (by_array,) = theirs([load_engine("detectron2").image_mapper(loaded.cfg)(pixels)])
    assert torch.equal(by_array["instances"].scores, found["instances"].scores)
    assert len(mine["scores"]) > 5
    torch.testing.assert_close(mine["scores"], found["instances"].scores, atol=1e-3, rtol=0)
    # Of a random model's, two with the same score may come in either order.
    assert (box_iou(mine["boxes"], found["instances"].pred_boxes.tensor).amax(dim=1) > 0.98).all()


def compare(expected: Any, found: dict[str, torch.Tensor]) -> int:
    """Match detections above 0.05 one to one; returns how many there were."""
    assert len(expected) == len(found["scores"])
    torch.testing.assert_close(found["scores"], expected.scores, atol=1e-3, rtol=0)
    assert torch.equal(found["classes"], expected.pred_classes)
    torch.testing.assert_close(found["boxes"], expected.pred_boxes.tensor, atol=1e-2, rtol=1e-4)
    if "masks" in found:
        both = (found["masks"] & expected.pred_masks).flatten(1).sum(1).double()
        either = (found["masks"] | expected.pred_masks).flatten(1).sum(1).double()
        assert ((both / either.clamp(min=1)) > 0.98)[either > 0].all()
    if "keypoints" in found:
        distance = (found["keypoints"][..., :2] - expected.pred_keypoints[..., :2]).abs()
        assert distance.max() < 0.5
    return len(expected)


@pytest.mark.parametrize("flip", ["none", "horizontal"])
def test_the_same_training_input(task: str, dataset: CocoDataset, flip: str) -> None:
    """Images, boxes, masks and keypoints after resizing and flipping."""
    loaded, theirs_cfg = configs(task, dataset, **{"INPUT.RANDOM_FLIP": flip, "INPUT.MIN_SIZE_TRAIN": (72,)})
    record = polygon_records(dataset)[0]
    ours = TrainingMapper(loaded.cfg, dataset.metadata)
    theirs = detectron2_mapper(theirs_cfg, dataset, True)

    def draw(make: Any, wanted: torch.Tensor | None) -> Any:
        for seed in range(60):
            np.random.seed(seed)
            sample = make(seed)
            if wanted is None or torch.equal(sample["image"], wanted):
                return sample
        raise AssertionError("no draw gave the same image: resizing or flipping differs")

    mine = draw(lambda seed: ours(record, np.random.default_rng(seed)), None)
    expected = draw(lambda _: theirs(record), mine["image"])["instances"]
    targets = mine["targets"]
    torch.testing.assert_close(targets.boxes, expected.gt_boxes.tensor)
    assert torch.equal(targets.classes, expected.gt_classes)
    if task == "mask":
        for polygons, wanted in zip(targets.masks, expected.gt_masks.polygons):
            for one, other in zip(polygons, wanted):
                np.testing.assert_allclose(one, other, atol=1e-3)
    if task == "keypoint":
        torch.testing.assert_close(targets.keypoints, expected.gt_keypoints.tensor)


def test_full_size_models_convert_both_ways_without_loss(task: str) -> None:
    cfg = detectron2_get_cfg()
    add_zenith_config(cfg)
    cfg.merge_from_file(f"{ROOT}/configs/{task}_rcnn_zenith.yaml")
    cfg.MODEL.DEVICE = "cpu"
    theirs = build_detectron2_model(cfg).state_dict()
    weights = conversion.from_detectron2(theirs)
    build_model(cfg).load_state_dict(weights, strict=True)
    back = conversion.to_detectron2(weights)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in back)


def test_the_conversion_tool_and_detectron2s_own_checkpointer(
    dataset: CocoDataset, task: str, tmp_path: Path
) -> None:
    """A checkpoint of ours, converted by the command, loads in Detectron2 whole; a model-zoo .pkl comes back."""
    from detectron2.checkpoint import DetectionCheckpointer

    loaded, theirs_cfg = configs(task, dataset)
    torch.manual_seed(1)
    ours = build_model(loaded.cfg).state_dict()
    config = tmp_path / "config.yaml"
    config.write_text(loaded.cfg.dump())
    torch.save({"model": ours}, tmp_path / "ours.pth")
    convert = [str(tmp_path / "ours.pth"), str(tmp_path / "theirs.pth")]
    convert_checkpoint.main([*convert, "--to", "detectron2", "--config-file", str(config)])
    model = build_detectron2_model(theirs_cfg)
    DetectionCheckpointer(model).load(str(tmp_path / "theirs.pth"))
    converted = conversion.to_detectron2(ours)
    assert all(torch.equal(value, converted[name]) for name, value in model.state_dict().items())

    zoo = {name: value.numpy() for name, value in model.state_dict().items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": zoo, "__author__": "Detectron2 Model Zoo"}))
    back = [str(tmp_path / "zoo.pkl"), str(tmp_path / "back.pth")]
    convert_checkpoint.main([*back, "--to", "torchvision", "--config-file", str(config)])
    again = read_weights(str(tmp_path / "back.pth"))
    assert set(again) == set(ours)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_imagenet_weights_with_caffe2_names_as_detectron2_loads_them(tmp_path: Path) -> None:
    """A file like ImageNetPretrained/MSRA/R-50.pkl, with random numbers, through both readers."""
    from detectron2.checkpoint import DetectionCheckpointer

    cfg = detectron2_get_cfg()
    add_zenith_config(cfg)
    cfg.merge_from_file(f"{ROOT}/configs/faster_rcnn_zenith.yaml")
    cfg.MODEL.DEVICE = "cpu"
    generator = np.random.default_rng(0)
    ours = build_model(cfg)
    blobs: dict[str, np.ndarray] = {}
    for name, value in ours.backbone.body.state_dict().items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        blobs[caffe2_name(name)] = generator.standard_normal(tuple(value.shape)).astype(np.float32)
    blobs["fc1000_w"] = np.zeros((1000, 2048), dtype=np.float32)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(blobs))
    theirs = build_detectron2_model(cfg)
    DetectionCheckpointer(theirs).load(str(path))
    expected = {
        k: v
        for k, v in conversion.from_detectron2(theirs.state_dict()).items()
        if k.startswith("backbone.body.")
    }
    found = conversion.from_caffe2_resnet(read_weights(str(path)))
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def caffe2_name(name: str) -> str:
    """The model zoo's name of one of our backbone's tensors."""
    if name == "conv1.weight":
        return "conv1_w"
    suffix = {"weight": "s", "bias": "b"}
    stem, kind = name.rsplit(".", 1)
    if stem == "bn1":
        return f"res_conv1_bn_{suffix[kind]}"
    layer, block, *rest = stem.split(".")
    prefix = f"res{int(layer[5:]) + 1}_{block}_branch"
    if rest[0] == "downsample":
        return f"{prefix}1_w" if rest[1] == "0" else f"{prefix}1_bn_{suffix[kind]}"
    branch = f"{prefix}2{'abc'[int(rest[0][-1]) - 1]}"
    return f"{branch}_w" if rest[0].startswith("conv") else f"{branch}_bn_{suffix[kind]}"


def test_the_demo_draws_the_same_with_either_engine(dataset: CocoDataset, task: str, tmp_path: Path) -> None:
    """The predictors behind tools/demo.py, each on its own checkpoint of the same weights; nothing else is there."""
    from zenith_det import Predictor
    from zenith_det.training.course.resume_report import config_facts

    ours, _, loaded, _ = trained_pair(task, dataset)
    facts = {"dataset": dataset.metadata.to_dict(), "config": config_facts(loaded.cfg)}
    converted = conversion.to_detectron2(ours.state_dict())
    torch.save({"model": ours.state_dict(), "engine": "torchvision", **facts}, tmp_path / "ours.pth")
    torch.save({"model": converted, "engine": "detectron2", **facts}, tmp_path / "theirs.pth")
    image = dataset.records[1]["file_name"]
    with_either = {
        "ours": Predictor(tmp_path / "ours.pth", threshold=None),
        "theirs": Predictor(tmp_path / "theirs.pth", threshold=None),
        # Detectron2's weights where there is no Detectron2.
        "converted": Predictor(tmp_path / "theirs.pth", threshold=None, engine="torchvision"),
    }
    expected = with_either["theirs"](image)
    assert type(with_either["theirs"].model).__module__.startswith("detectron2")
    for name in ("ours", "converted"):
        found = with_either[name](image)
        assert len(found) == len(expected) > 0
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
        assert found.class_names == expected.class_names
        if task == "mask":
            assert found.masks.shape == expected.masks.shape
            assert (found.masks != expected.masks).mean() < 1e-3
        if task == "keypoint":
            np.testing.assert_allclose(found.keypoints[..., :2], expected.keypoints[..., :2], atol=1.0)


def test_a_thin_image_keeps_a_pixel_with_either_engine(
    dataset: CocoDataset, task: str, tmp_path: Path
) -> None:
    """1000x2 would be resized to a height of 0."""
    from zenith_det.engines.detectron2_engine.data import CocoMapper

    loaded, cfg = configs(task, dataset, **{"INPUT.MAX_SIZE_TRAIN": 160, "MODEL.KEYPOINT_ON": False})
    Image.new("RGB", (1000, 2), (9, 99, 200)).save(tmp_path / "thin.png")
    record = {
        **dataset.records[0],
        "file_name": str(tmp_path / "thin.png"),
        "height": 2,
        "width": 1000,
        "annotations": [{**dataset.records[0]["annotations"][0], "bbox": [100, 0, 500, 2]}],
    }
    theirs = CocoMapper(cfg, True)(record)
    ours = TrainingMapper(loaded.cfg, dataset.metadata)(record, np.random.default_rng(0))
    for sample in (theirs, ours):
        assert min(sample["image"].shape) >= 1
        assert max(sample["image"].shape) > 50
    assert len(theirs["instances"]) == len(ours["targets"].boxes) == 1
