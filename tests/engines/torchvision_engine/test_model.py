"""The detector: what of Detectron2's recipe a user would miss, and inputs that crash lesser models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from tests.engines.torchvision_engine.small_models import no_targets, samples, small_config, square_targets
from zenith_det.engines.torchvision_engine import masks
from zenith_det.engines.torchvision_engine.backbone import NORM_LAYERS
from zenith_det.engines.torchvision_engine.masks import crop_and_resize, paste_masks, polygons_to_bitmap
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.engines.torchvision_engine.roi_heads import AlignedPooler, Targets, rois_of
from zenith_det.engines.torchvision_engine.rpn import UnroundedAnchors
from zenith_det.engines.torchvision_engine.support import check_supported

KEYPOINTS = {"faster": 0, "mask": 0, "keypoint": 17}


@pytest.mark.parametrize("task", ["faster", "mask", "keypoint"])
def test_every_trainable_parameter_gets_a_gradient(task: str) -> None:
    torch.manual_seed(0)
    model = build_model(small_config(task).cfg)
    targets = square_targets(KEYPOINTS[task])
    losses = model(samples(targets, targets))
    expected = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    expected |= {"mask": {"loss_mask"}, "keypoint": {"loss_keypoint"}}.get(task, set())
    assert set(losses) == expected
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("task", ["faster", "mask", "keypoint"])
def test_a_batch_of_images_without_objects_trains_finite(task: str) -> None:
    """https://github.com/pytorch/vision/issues/2144: NaN for images without annotations."""
    torch.manual_seed(0)
    model = build_model(small_config(task).cfg)
    losses = model(samples(no_targets(KEYPOINTS[task]), no_targets(KEYPOINTS[task])))
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert losses["loss_box_reg"].item() == 0.0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_objects_without_masks_beside_objects_with() -> None:
    """Polygons, a bitmap and a missing mask in one image: the missing one alone doesn't count."""
    torch.manual_seed(0)
    model = build_model(small_config("mask").cfg)
    bitmap = torch.zeros(64, 64, dtype=torch.bool)
    bitmap[20:50, 30:60] = True
    full = square_targets()
    mixed = Targets(full.boxes, full.classes, [full.masks[0], bitmap])
    partly = Targets(full.boxes, full.classes, [full.masks[0], None])
    none = Targets(full.boxes, full.classes, [None, None])
    torch.manual_seed(1)
    with_both = float(model(samples(full))["loss_mask"])
    torch.manual_seed(1)
    with_bitmap = float(model(samples(mixed))["loss_mask"])
    assert with_bitmap == pytest.approx(with_both, abs=0.02)
    assert float(model(samples(partly))["loss_mask"]) > 0
    assert float(model(samples(none))["loss_mask"]) == 0.0


def test_detections_are_in_the_original_image_and_sorted() -> None:
    torch.manual_seed(0)
    model = build_model(small_config("mask", MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0).cfg).eval()
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        found = model([{"image": image, "height": 128, "width": 192}])[0]
    assert len(found["scores"]) > 0
    assert found["masks"].shape == (len(found["scores"]), 128, 192)
    assert found["masks"].dtype == torch.bool
    assert (found["boxes"][:, 2] <= 192).all()
    assert (found["boxes"][:, 3] <= 128).all()
    assert found["boxes"].max() > 96, "boxes were not scaled to the original image"
    assert (found["scores"].diff() <= 0).all()


@pytest.mark.parametrize("task", ["faster", "mask", "keypoint"])
def test_no_detection_at_all_is_an_empty_result(task: str) -> None:
    model = build_model(small_config(task, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.999).cfg).eval()
    with torch.no_grad():
        found = model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])[0]
    assert all(len(value) == 0 for value in found.values())


def test_anchors_are_not_rounded_and_keep_detectron2s_strides() -> None:
    anchors = UnroundedAnchors(((32.0,), (512.0,)), ((0.5, 1.0, 2.0),) * 2, [4, 64])
    cell = anchors.generate_anchors((32.0,), (0.5, 1.0, 2.0))
    width = math.sqrt(32**2 / 0.5)
    assert cell[0].tolist() == pytest.approx([-width / 2, -width / 4, width / 2, width / 4])
    maps = [torch.zeros(1, 8, 24, 24), torch.zeros(1, 8, 2, 2)]

    class Images:
        image_sizes = [(96, 96)]

    boxes = anchors(Images(), maps)[0]
    centers = (boxes[-12:, :2] + boxes[-12:, 2:]) / 2
    # A 96-pixel image has a p6 of 2 x 2: torchvision would take 48 for its stride.
    assert sorted({x for x, _ in centers.tolist()}) == [0.0, 64.0]


def test_pooling_is_aligned() -> None:
    """A box over whole pixels of a ramp pools to their centres' values; without alignment, half a pixel off."""
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    box = rois_of([torch.tensor([[4.0, 4.0, 8.0, 8.0]])])
    aligned = AlignedPooler(4, [1], 0, True)([ramp], box)[0, 0, 0]
    assert aligned.tolist() == pytest.approx([4.0, 5.0, 6.0, 7.0])
    assert AlignedPooler(4, [1], 0, False)([ramp], box)[0, 0, 0].tolist() != pytest.approx(aligned.tolist())


@pytest.mark.parametrize(
    ("side", "level"), [(20, 0), (111, 0), (113, 1), (223, 1), (225, 2), (449, 3), (2000, 3)]
)
def test_boxes_go_to_their_level(side: int, level: int) -> None:
    features = [torch.full((1, 1, 512 >> i, 512 >> i), float(i)) for i in range(4)]
    rois = rois_of([torch.tensor([[0.0, 0.0, side, side]])])
    pooled = AlignedPooler(2, [4, 8, 16, 32], 2, True)(features, rois)
    assert float(pooled[0, 0, 0, 0]) == level


def test_frozen_stages_and_norms() -> None:
    cfg = small_config("faster", MODEL__RESNETS__NORM="BN", MODEL__BACKBONE__FREEZE_AT=2).cfg
    body = build_model(cfg).backbone.body
    assert not any(p.requires_grad for p in [*body.conv1.parameters(), *body.layer1.parameters()])
    assert all(p.requires_grad for p in body.layer2.parameters())
    assert isinstance(body.bn1, FrozenBatchNorm2d)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in body.layer1.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in body.layer2.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frozen_norm_computes_torchvisions_and_keeps_precision(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = FrozenBatchNorm2d(6)
    for buffer in theirs.buffers():
        buffer.uniform_(0.5, 2.0, generator=generator)
    ours = NORM_LAYERS["FrozenBN"](6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 5, 7, generator=generator).to(dtype=dtype, memory_format=memory_format)
    x.requires_grad_()
    y, expected = ours(x), theirs(x.detach().double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(
        y.double(), expected.double(), rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )
    y.sum().backward()
    scale = theirs.weight * (theirs.running_var + theirs.eps).rsqrt()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, scale.to(dtype).view(1, 6, 1, 1).expand_as(x), check_stride=False)


@pytest.mark.parametrize("in_1x1", [True, False])
def test_where_a_bottleneck_strides(in_1x1: bool) -> None:
    cfg = small_config(
        "faster",
        MODEL__RESNETS__DEPTH=50,
        MODEL__RESNETS__RES2_OUT_CHANNELS=256,
        MODEL__RESNETS__STRIDE_IN_1X1=in_1x1,
    ).cfg
    block = build_model(cfg).backbone.body.layer2[0]
    assert block.conv1.stride == ((2, 2) if in_1x1 else (1, 1))
    assert block.conv2.stride == ((1, 1) if in_1x1 else (2, 2))


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_depths_build(depth: int) -> None:
    loaded = small_config(
        "mask", MODEL__RESNETS__DEPTH=depth, MODEL__RESNETS__RES2_OUT_CHANNELS=64 if depth < 50 else 256
    )
    check_supported(loaded)
    assert sum(p.numel() for p in build_model(loaded.cfg).parameters()) > 1e6


def test_a_backbone_without_its_last_stage() -> None:
    """As Detectron2 builds it: no weights that nothing uses, and images padded to the last stage's stride."""
    loaded = small_config(
        "faster",
        MODEL__RESNETS__OUT_FEATURES=["res2", "res3", "res4"],
        MODEL__FPN__IN_FEATURES=["res2", "res3", "res4"],
        MODEL__RPN__IN_FEATURES=["p2", "p3", "p4", "p5"],
        MODEL__ROI_HEADS__IN_FEATURES=["p2", "p3", "p4"],
        MODEL__ANCHOR_GENERATOR__SIZES=[[8], [16], [32], [64]],
    )
    check_supported(loaded)
    model = build_model(loaded.cfg)
    assert not any(name.startswith("backbone.body.layer4") for name in model.state_dict())
    assert model.backbone.size_divisibility == 16
    sum(model(samples(square_targets(), no_targets())).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_mask_targets_agree_between_polygons_and_bitmaps() -> None:
    polygon = [np.array([10.0, 8.0, 50.0, 14.0, 40.0, 56.0, 12.0, 44.0])]
    bitmap = torch.from_numpy(polygons_to_bitmap(polygon, 64, 64))
    boxes = torch.tensor([[8.0, 6.0, 52.0, 58.0], [20.0, 20.0, 60.0, 60.0]])
    from_polygon = crop_and_resize([polygon, polygon], boxes, 28)
    from_bitmap = crop_and_resize([bitmap, bitmap], boxes, 28)
    assert from_polygon.any()
    assert (from_polygon != from_bitmap).float().mean() < 0.03


def test_a_mask_survives_crop_and_paste() -> None:
    polygon = [np.array([10.0, 8.0, 50.0, 14.0, 40.0, 56.0, 12.0, 44.0])]
    boxes = torch.tensor([[10.0, 8.0, 50.0, 56.0]])
    pasted = paste_masks(crop_and_resize([polygon], boxes, 28).float(), boxes, 64, 64)[0].numpy()
    truth = polygons_to_bitmap(polygon, 64, 64)
    overlap = (pasted & truth).sum() / (pasted | truth).sum()
    assert overlap > 0.95


def test_masks_that_the_device_has_no_room_for_are_pasted_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probabilities, boxes = torch.rand(3, 28, 28), torch.tensor([[4.0, 4.0, 50.0, 40.0]] * 3)
    expected = paste_masks(probabilities, boxes, 64, 64)
    paste, calls = masks._paste_masks, []

    def without_room_at_first(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return paste(*args)

    monkeypatch.setattr(masks, "_paste_masks", without_room_at_first)
    assert paste_masks(probabilities, boxes, 64, 64).equal(expected)
    assert len(calls) == 2
