"""``MODEL.WEIGHTS`` for the built-in engine: whoever's names the file has, they end up in our model."""

from __future__ import annotations

import logging
import re

from torch import Tensor, nn
from torchvision import models

from zenith_det.config import CfgNode
from zenith_det.engines.torchvision_engine import conversion
from zenith_det.errors import CheckpointError, ConfigError
from zenith_det.training.checkpoints.weights import LoadReport, load_model_weights, read_weights

logger = logging.getLogger(__name__)

TORCHVISION_NAME = re.compile(r"^\w+_Weights\.\w+$")


def load_weights(cfg: CfgNode, model: nn.Module, *, require_all: bool = False) -> LoadReport | None:
    """Load ``MODEL.WEIGHTS`` into ``model``; empty means random initialization.

    Takes a file or URL in this engine's names, Detectron2's (``.pth``, model-zoo ``.pkl``), Caffe2's (the model
    zoo's ImageNet backbones), or torchvision's (classifiers and R-CNNs), and torchvision's names of weights
    (``ResNet50_Weights.IMAGENET1K_V1``).

    Args:
        require_all: every tensor must be in the file, as evaluation needs.

    Raises:
        CheckpointError: it can't be read or fetched, or belongs to another model.
        ConfigError: torchvision's weights under a configuration for other ones.
    """
    name: str = cfg.MODEL.WEIGHTS
    if not name:
        return None
    url = torchvision_url(name) if TORCHVISION_NAME.match(name) else name
    tensors = to_our_names(cfg, read_weights(url))
    own = model.state_dict()
    # Counters that norms frozen into constants have no use for.
    tensors = {k: v for k, v in tensors.items() if k in own or not k.endswith("num_batches_tracked")}
    report = load_model_weights(
        model,
        tensors,
        source=name,
        require_all=require_all,
        allow_mismatch=cfg.MODEL.WEIGHTS_ALLOW_MISMATCH,
    )
    logger.info(report.summary())
    return report


def torchvision_url(name: str) -> str:
    """The address of the weights that torchvision calls ``name``.

    Raises:
        CheckpointError: torchvision knows none of that name.
    """
    try:
        return str(models.get_weight(name).url)
    except (ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"MODEL.WEIGHTS: torchvision has no weights {name!r}: see https://pytorch.org/vision/stable/models.html"
        ) from error


def to_our_names(cfg: CfgNode, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any origin that :func:`load_weights` names, converted; ours pass through."""
    lowest = conversion.lowest_level(cfg)
    if any(name.startswith(("backbone.bottom_up.", "proposal_generator.")) for name in tensors):
        return conversion.from_detectron2(tensors, lowest)
    if "conv1_w" in tensors:
        return conversion.from_caffe2_resnet(tensors)
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        _check_torchvision_stride(cfg)
        if cfg.INPUT.FORMAT == "YUV-BT.601" or len(cfg.MODEL.PIXEL_MEAN) != 3:
            raise ConfigError(
                f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: torchvision's first layer is for red, green and blue: take "
                "INPUT.FORMAT BGR, RGB, or L with three entries in MODEL.PIXEL_MEAN and PIXEL_STD"
            )
        return conversion.from_torchvision_resnet(tensors, cfg.INPUT.FORMAT, list(cfg.MODEL.PIXEL_STD))
    if "roi_heads.box_head.fc6.weight" in tensors:
        _check_torchvision_stride(cfg)
        return conversion.from_torchvision_detector(tensors, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return tensors


def _check_torchvision_stride(cfg: CfgNode) -> None:
    if cfg.MODEL.RESNETS.DEPTH >= 50 and cfg.MODEL.RESNETS.STRIDE_IN_1X1:
        raise ConfigError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: torchvision's ResNets stride in their 3x3 convolutions: set "
            "MODEL.RESNETS.STRIDE_IN_1X1 False"
        )
