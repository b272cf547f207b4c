"""Random examples of a stage's candidates, and what else can be had with few waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


class Late:
    """Numbers that the device is still working on.

    To ask for them waits for the device, but not where the host has waited for anything that the device does later.

    Args:
        numbers: any shape.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type != "cuda":
            self._numbers = numbers
            return
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._numbers.copy_(numbers, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def tolist(self) -> list[int]:
        """The numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[int] = self._numbers.tolist()
        return numbers


class Candidates:
    """A stage's candidates, of which a loss looks at a few: Detectron2's ``subsample_labels``, for all images at once.

    Args:
        labels: of all images one after another, ``(A,)``: 1 for positive and 0 for negative candidates; others are
            never drawn.
        sizes: how many of them each image has.
    """

    def __init__(self, labels: Tensor, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        # Counts after none, after each of all images' that is positive, and after each that is negative.
        none = labels.new_zeros(1, dtype=torch.bool)
        self._counts = torch.cat((none, labels == 1, labels == 0)).cumsum(0, dtype=torch.int32)
        ends = torch.tensor(list(accumulate([*sizes, *sizes], initial=0)))
        self._at_ends = Late(self._counts[to_device(ends, labels.device)])

    @torch.no_grad()
    def draw(self, count: int, positive_share: float) -> tuple[Tensor, Tensor]:
        """Draw as many of each image as a loss looks at.

        Args:
            count: of examples an image.
            positive_share: of them that are positive at most; negative ones take the place of missing positive ones.

        Returns:
            Where in ``labels`` the positive and the negative examples are: image after image, in random order.
        """
        kinds = [(before, after - before) for before, after in pairwise(self._at_ends.tolist())]
        images = len(self._sizes)
        drawn: list[list[Tensor]] = [[], []]
        for positive, negative in zip(kinds[:images], kinds[images:]):
            positives = min(positive[1], int(count * positive_share))
            negatives = min(negative[1], count - positives)
            for numbers, (before, total), most in zip(drawn, (positive, negative), (positives, negatives)):
                numbers.append(torch.randperm(total, device=self._counts.device)[:most] + (before + 1))
        first, second = map(torch.cat, drawn)
        # The n-th is where the count reaches n.
        found = torch.searchsorted(self._counts, torch.cat((first, second)).to(self._counts.dtype)) - 1
        return found[: len(first)], found[len(first) :] - sum(self._sizes)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; the host doesn't wait for the copy."""
    return values if values.device.type == device.type else values.pin_memory().to(device, non_blocking=True)
