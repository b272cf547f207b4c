"""Batch norm as a constant, in one pass over the features and in their own precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import ops


class FrozenBatchNorm2d(ops.FrozenBatchNorm2d):
    """torchvision's, which multiplies and adds in two passes and makes float32 of half-precision features.

    Under AMP that would take every ReLU and every sum of a ResNet in float32; Detectron2's keeps the
    precision, too. Buffers and checkpoints are torchvision's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape, dtype and memory format."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        shape = (1, -1, 1, 1)
        return torch.addcmul(shift.view(shape).to(x.dtype), x, scale.view(shape).to(x.dtype))
