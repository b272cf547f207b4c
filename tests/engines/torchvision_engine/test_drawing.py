"""Examples drawn for all images at once are those of torchvision's sampler; and the box coder is its."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.ops import boxes as box_ops

from zenith_det.engines.torchvision_engine import box_regression
from zenith_det.engines.torchvision_engine.drawing import Candidates


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
