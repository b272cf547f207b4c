"""Examples drawn for all images at once are those of torchvision's sampler; and the box coder is its."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.ops import boxes as box_ops

from zenith_det.engines.torchvision_engine import box_regression
from zenith_det.engines.torchvision_engine.drawing import Candidates
from zenith_det.engines.torchvision_engine.rpn import best_after_nms


@pytest.mark.parametrize("positive_share", [0.25, 1.0])
def test_the_examples_are_those_of_torchvision(positive_share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(-1, 2, (size,), generator=generator) for size in (300, 9, 1)]
    labels += [torch.full((20,), value) for value in (-1, 0, 1)]
    torch.manual_seed(1)
    drawn = Candidates(torch.cat(labels), [len(one) for one in labels]).draw(16, positive_share)
    torch.manual_seed(1)
    for index, masks in zip(drawn, BalancedPositiveNegativeSampler(16, positive_share)(labels)):
        assert sorted(index.tolist()) == torch.cat(masks).nonzero().flatten().tolist()
    assert sum((index < 300).sum() for index in drawn) == 16


@pytest.mark.parametrize("sizes", [[0, 3, 0], [0, 0]])
def test_an_image_without_candidates_has_no_examples(sizes: list[int]) -> None:
    positive, negative = Candidates(torch.ones(sum(sizes)), sizes).draw(2, 1.0)
    assert len(positive) == min(sum(sizes), 2)
    assert len(negative) == 0


@pytest.mark.parametrize("per_level", [100, 400])
@pytest.mark.parametrize("spread", [3.0, 100.0])  # few of them are left, or most
def test_the_best_after_nms_are_the_first_of_torchvisions(per_level: int, spread: float) -> None:
    torch.manual_seed(0)
    levels = torch.arange(3.0).repeat_interleave(per_level)
    corner = (torch.rand(2, len(levels), 2) * spread).round()
    boxes = torch.cat((corner, corner + 10 + torch.rand(2, len(levels), 2) * 5), dim=2)
    scores = (torch.randn(2, len(levels)) * 50).round()  # with ties
    absent = torch.rand(2, len(levels)) < 0.3
    found = best_after_nms(
        torch.where(absent[..., None], 0.0, boxes), scores.masked_fill(absent, -torch.inf), levels, 0.7, 90
    )
    for index, own, score, there in zip(found, boxes, scores, (~absent)):
        there = there.nonzero().squeeze(1)
        kept = there[box_ops.batched_nms(own[there], score[there], levels[there], 0.7)]
        assert torch.equal(index, kept[:90])
        assert 0 < len(index) < len(there)


@pytest.mark.parametrize("kinds", [1, 3])
def test_the_box_coder_is_torchvisions(kinds: int) -> None:
    torch.manual_seed(0)
    corner = torch.rand(50, 2) * 100
    boxes = torch.cat((corner, corner + 1 + torch.rand(50, 2) * 40), dim=1)
    weights = (10.0, 10.0, 5.0, 5.0)
    ours, theirs = box_regression.BoxCoder(weights), BoxCoder(weights)
    assert torch.equal(ours.encode_single(boxes.flip(0), boxes), theirs.encode_single(boxes.flip(0), boxes))
    deltas = torch.randn(50, 4 * kinds) * 20  # some beyond what is clamped
    assert torch.equal(ours.decode_single(deltas, boxes), theirs.decode_single(deltas, boxes))
    assert ours.decode_single(deltas[:0], boxes[:0]).shape == (0, 4 * kinds)
    assert box_ops.box_area(ours.decode_single(deltas, boxes).view(-1, 4)).isfinite().all()
