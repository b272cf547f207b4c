"""Weights of other programs in our model: the features they were trained to give come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import resnet
from torchvision.models.detection import keypointrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

from tests.engines.torchvision_engine.small_models import WHOLE_RESNET, small_config
from zenith_det.engines.torchvision_engine import conversion
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.engines.torchvision_engine.weights import load_weights, torchvision_url
from zenith_det.errors import CheckpointError, ConfigError

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    ("image_format", "std"),
    [("BGR", [1.0, 1.0, 1.0]), ("BGR", [57.375, 57.12, 58.395]), ("RGB", [58.395, 57.12, 57.375])],
)
def test_a_torchvision_backbone_sees_the_input_it_was_trained_on(
    tmp_path: Path, image_format: str, std: list[float]
) -> None:
    torch.manual_seed(0)
    classifier = resnet.resnet18().eval()
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    mean = [123.675, 116.28, 103.53]
    cfg = small_config(
        "faster",
        MODEL__WEIGHTS=str(tmp_path / "resnet18.pth"),
        MODEL__RESNETS__NORM="FrozenBN",
        MODEL__PIXEL_MEAN=mean if image_format == "RGB" else mean[::-1],
        MODEL__PIXEL_STD=std,
        INPUT__FORMAT=image_format,
        **WHOLE_RESNET,
    ).cfg
    model = build_model(cfg).eval()
    report = load_weights(cfg, model)
    assert report is not None
    assert all(name.startswith("backbone.body") for name in report.matched)
    assert not report.unexpected
    rgb = torch.randint(0, 256, (3, 64, 64)).float()
    normalized = (rgb / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
        3, 1, 1
    )
    ours = rgb if image_format == "RGB" else rgb.flip(0)
    ours = (ours - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        expected = classifier.conv1(normalized[None])
        found = model.backbone.body.conv1(ours[None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_torchvision_strides_elsewhere_in_a_bottleneck(tmp_path: Path) -> None:
    torch.save(resnet.resnet50().state_dict(), tmp_path / "resnet50.pth")
    cfg = small_config(
        "faster",
        MODEL__WEIGHTS=str(tmp_path / "resnet50.pth"),
        MODEL__RESNETS__DEPTH=50,
        MODEL__RESNETS__RES2_OUT_CHANNELS=256,
    ).cfg
    with pytest.raises(ConfigError, match="STRIDE_IN_1X1 False"):
        load_weights(cfg, build_model(cfg))


@pytest.mark.parametrize(
    ("task", "build"), [("mask", maskrcnn_resnet50_fpn), ("keypoint", keypointrcnn_resnet50_fpn)]
)
def test_torchvision_detectors_load_whole_with_the_background_moved(task: str, build: object) -> None:
    assert callable(build)
    classes = 3 if task == "mask" else 1
    theirs = build(weights=None, weights_backbone=None, num_classes=classes + 1).state_dict()
    converted = conversion.from_torchvision_detector(theirs, classes)
    cfg = small_config(
        task,
        MODEL__RESNETS__DEPTH=50,
        MODEL__RESNETS__RES2_OUT_CHANNELS=256,
        MODEL__RESNETS__NORM="BN",
        MODEL__RESNETS__STRIDE_IN_1X1=False,
        MODEL__FPN__NORM="",
        MODEL__FPN__OUT_CHANNELS=256,
        MODEL__ROI_HEADS__NUM_CLASSES=classes,
        MODEL__ROI_BOX_HEAD__FC_DIM=1024,
        MODEL__ROI_MASK_HEAD__CONV_DIM=256,
        MODEL__ROI_MASK_HEAD__NUM_CONV=4,
        MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS=(512,) * 8,
        **WHOLE_RESNET,
    ).cfg
    missing = build_model(cfg).load_state_dict(converted, strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    scores = theirs["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(converted["roi_heads.box_predictor.cls_score.weight"][-1], scores[0])
    assert torch.equal(converted["roi_heads.box_predictor.cls_score.weight"][0], scores[1])
    assert converted["roi_heads.box_predictor.bbox_pred.weight"].shape[0] == 4 * classes


def test_91_outputs_of_torchvisions_coco_models_become_80() -> None:
    names = ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"]
    rows = torch.arange(91.0)
    state = {"roi_heads.box_head.fc6.weight": torch.zeros(1)}
    for kind in ("weight", "bias"):
        state[f"{names[0]}.{kind}"] = rows.clone()
        state[f"{names[1]}.{kind}"] = rows.repeat_interleave(4)
    scores = conversion.from_torchvision_detector(state, 80)["roi_heads.box_predictor.cls_score.weight"]
    # toothbrush, COCO's last category, has id 90; street sign (12) is not annotated.
    assert len(scores) == 81
    assert scores[-1] == 0
    assert scores[-2] == 90
    assert 12 not in scores.tolist()


def test_weight_names() -> None:
    assert torchvision_url("ResNet50_Weights.IMAGENET1K_V1").startswith("https://")
    with pytest.raises(CheckpointError, match=r"no weights 'ResNet51_Weights\.IMAGENET1K_V1'"):
        torchvision_url("ResNet51_Weights.IMAGENET1K_V1")


def test_names_that_no_rule_covers_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"proposal_generator\.rotated"):
        conversion.from_detectron2({"proposal_generator.rotated.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"roi_heads\.extra"):
        conversion.to_detectron2({"roi_heads.extra.weight": torch.zeros(1)})
