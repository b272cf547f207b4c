"""Examples drawn with one wait are those of torchvision's sampler; and the box coder is its."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.ops import boxes as box_ops

from zenith_det.engines.torchvision_engine import box_regression
from zenith_det.engines.torchvision_engine.drawing import draw_examples, first_true


@pytest.mark.parametrize("positive_share", [0.25, 1.0])
def test_the_examples_are_those_of_torchvision(positive_share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(-1, 2, (size,), generator=generator) for size in (300, 9, 1)]
    labels += [torch.full((20,), value) for value in (-1, 0, 1)]
    torch.manual_seed(1)
    drawn = draw_examples(labels, 16, positive_share)
    torch.manual_seed(1)
    for pair, *masks in zip(drawn, *BalancedPositiveNegativeSampler(16, positive_share)(labels)):
        for index, mask in zip(pair, masks):
            assert sorted(index.tolist()) == mask.nonzero().flatten().tolist()
    assert sum(len(index) for index in drawn[0]) == 16


def test_an_image_without_candidates_has_no_examples() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert [len(index) for index in draw_examples([nothing, torch.ones(3)], 2, 0.5)[0]] == [0, 0]
    assert first_true([torch.zeros(0, dtype=torch.bool)])[0].tolist() == []


def test_the_first_true_are_where_they_are() -> None:
    masks = [torch.tensor([False, True, True, False, True]), torch.zeros(4, dtype=torch.bool)]
    assert [index.tolist() for index in first_true(masks)] == [[1, 2, 4], []]


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
