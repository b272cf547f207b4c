"""What Detectron2's models need for configurations that the built-in engine trains, too."""

from __future__ import annotations

from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import nn

__all__ = ["connect_top_level"]


def connect_top_level(model: nn.Module) -> None:
    """Let an FPN's extra level follow its coarsest one, whatever that is called.

    Detectron2 pools it from a level named "p5", and so fails on a backbone without its last stage
    (``MODEL.RESNETS.OUT_FEATURES`` up to "res4"), which the built-in engine trains. Of no effect on others.
    """
    for module in model.modules():
        if isinstance(module, FPN) and isinstance(module.top_block, LastLevelMaxPool):
            module.top_block.in_feature = module._out_features[-1 - module.top_block.num_levels]
