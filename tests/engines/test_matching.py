"""Anchors matched in parts get the labels that the libraries' matchers give them, whatever the parts."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor

from zenith_det.config import load_config
from zenith_det.engines import matching
from zenith_det.engines.torchvision_engine import rpn


def boxes_like(count: int, seed: int) -> Tensor:
    """Boxes on a coarse grid, so that ties occur."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 40, (count, 2), generator=generator)
    side = torch.randint(2, 12, (count, 2), generator=generator)
    return torch.cat((corner, corner + side), dim=1).float()


@pytest.fixture(params=[1, 50, 7000])
def most_pairs(request: pytest.FixtureRequest) -> int:
    """One anchor at a time, an uneven number of them, all but the last few."""
    number: int = request.param
    return number


def test_the_built_in_engines(most_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config("mask_rcnn_zenith.yaml").cfg
    network = rpn.RPN(cfg, 8, {name: 4 * 2**i for i, name in enumerate(cfg.MODEL.RPN.IN_FEATURES)})
    anchors = [boxes_like(400, 1), boxes_like(400, 2), boxes_like(400, 3)]
    targets = [{"boxes": boxes_like(count, 4 + count)} for count in (18, 0, 1)]
    expected = network.assign_targets_to_anchors(anchors, targets)  # torchvision's own
    assert {-1.0, 0.0, 1.0} == set(torch.cat(expected[0]).tolist())
    for pairs in (rpn.MOST_PAIRS, min(most_pairs, 399)):
        monkeypatch.setattr(rpn, "MOST_PAIRS", pairs)
        for one, target, label_before, match_before in zip(anchors, targets, *expected):
            index, label = network.match(one, target["boxes"])
            assert torch.equal(label.float(), label_before)
            # Of the others it says nothing.
            assert torch.equal(target["boxes"][index[label == 1]], match_before[label == 1])


@pytest.mark.detectron2
def test_detectron2s(most_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")
    from detectron2.config import get_cfg
    from detectron2.modeling.backbone import build_backbone
    from detectron2.modeling.proposal_generator.rpn import RPN
    from detectron2.structures import Boxes, Instances

    from zenith_det.engines.detectron2_engine import models

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    network = RPN(cfg, build_backbone(cfg).output_shape())
    anchors = [Boxes(boxes_like(400, 1)), Boxes(boxes_like(100, 2))]
    images = [
        Instances((50, 50), gt_boxes=Boxes(boxes_like(count, 4 + count)), gt_classes=torch.zeros(count))
        for count in (18, 0, 1)
    ]
    compared: list[int] = []
    iou = models._iou
    monkeypatch.setattr(models, "_iou", lambda a, b: compared.append(len(a) * len(b)) or iou(a, b))

    def label(most: int) -> tuple[list[Tensor], list[Tensor]]:
        monkeypatch.setattr(models, "MOST_PAIRS", most)
        network._subsample_labels = types.MethodType(
            lambda self, labels: labels, network
        )  # it draws at random
        labels, matched = network.label_and_sample_anchors(anchors, images)
        return labels, matched

    expected = label(matching.MOST_PAIRS)
    models.match_in_bounded_memory(network)
    found = label(min(most_pairs, 499))
    assert compared
    assert max(compared) <= max(most_pairs, 18)
    for ours, theirs in zip(found, expected):
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(ours, theirs))
