"""Names and layouts of weights: ours, Detectron2's, torchvision's and the Caffe2 ones of the model zoo.

The built-in engine keeps torchvision's module names and Detectron2's layout of the class outputs (the
background last, no box or mask for it). So a Detectron2 checkpoint converts by renaming alone, both ways
and without loss, while a detector of torchvision's own also has its class rows moved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zenith_det.errors import CheckpointError

Weights = dict[str, Tensor]

# Ours and Detectron2's: "#" is a number, "*" a tensor's own name. Where the first number differs, how: theirs is
# ours // SCALE + OFFSET.
_BLOCK = ("backbone.body.layer#.#.", "backbone.bottom_up.res#.#.")
_RULES: tuple[tuple[str, str, int, int], ...] = (
    ("backbone.body.conv1.*", "backbone.bottom_up.stem.conv1.*", 1, 0),
    ("backbone.body.bn1.*", "backbone.bottom_up.stem.conv1.norm.*", 1, 0),
    (_BLOCK[0] + "conv#.*", _BLOCK[1] + "conv#.*", 1, 1),
    (_BLOCK[0] + "bn#.*", _BLOCK[1] + "conv#.norm.*", 1, 1),
    (_BLOCK[0] + "downsample.0.*", _BLOCK[1] + "shortcut.*", 1, 1),
    (_BLOCK[0] + "downsample.1.*", _BLOCK[1] + "shortcut.norm.*", 1, 1),
    ("rpn.head.conv.#.0.*", "proposal_generator.rpn_head.conv.conv#.*", 1, 0),
    ("rpn.head.conv.0.0.*", "proposal_generator.rpn_head.conv.*", 1, 0),
    ("rpn.head.cls_logits.*", "proposal_generator.rpn_head.objectness_logits.*", 1, 0),
    ("rpn.head.bbox_pred.*", "proposal_generator.rpn_head.anchor_deltas.*", 1, 0),
    ("roi_heads.box_head.conv#.0.*", "roi_heads.box_head.conv#.*", 1, 0),
    ("roi_heads.box_head.conv#.1.*", "roi_heads.box_head.conv#.norm.*", 1, 0),
    ("roi_heads.box_head.fc#.*", "roi_heads.box_head.fc#.*", 1, 0),
    ("roi_heads.box_predictor.cls_score.*", "roi_heads.box_predictor.cls_score.*", 1, 0),
    ("roi_heads.box_predictor.bbox_pred.*", "roi_heads.box_predictor.bbox_pred.*", 1, 0),
    ("roi_heads.mask_head.#.0.*", "roi_heads.mask_head.mask_fcn#.*", 1, 1),
    ("roi_heads.mask_head.#.1.*", "roi_heads.mask_head.mask_fcn#.norm.*", 1, 1),
    ("roi_heads.mask_predictor.conv5_mask.*", "roi_heads.mask_head.deconv.*", 1, 0),
    ("roi_heads.mask_predictor.mask_fcn_logits.*", "roi_heads.mask_head.predictor.*", 1, 0),
    ("roi_heads.keypoint_head.#.*", "roi_heads.keypoint_head.conv_fcn#.*", 2, 1),
    ("roi_heads.keypoint_predictor.kps_score_lowres.*", "roi_heads.keypoint_head.score_lowres.*", 1, 0),
)

_CAFFE2_PARTS = {
    "branch1": ("downsample.0", "downsample.1"),
    **{f"branch2{'abc'[i]}": (f"conv{i + 1}", f"bn{i + 1}") for i in range(3)},
}
_CAFFE2_RULES = [
    ("backbone.body.conv1.weight", "conv1_w", 1, 0),
    ("backbone.body.bn1.weight", "res_conv1_bn_s", 1, 0),
    ("backbone.body.bn1.bias", "res_conv1_bn_b", 1, 0),
    *(
        (f"backbone.body.layer#.#.{ours}", f"res#_#_{branch}_{theirs}", 1, 1)
        for branch, (conv, norm) in _CAFFE2_PARTS.items()
        for ours, theirs in ((f"{conv}.weight", "w"), (f"{norm}.weight", "bn_s"), (f"{norm}.bias", "bn_b"))
    ),
]

COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
# Channel statistics of ImageNet, RGB, that torchvision's weights were trained with (pixels in 0..255).
TORCHVISION_STD = (58.395, 57.12, 57.375)
# Left out when reading: constants of the configuration, not weights.
_CONSTANTS = re.compile(r"(^|\.)(pixel_mean|pixel_std|cell_anchors\.\d+)$")


def lowest_level(cfg: Any) -> int:
    """The number of the finest feature map that ``MODEL.FPN.IN_FEATURES`` names: 2 for res2."""
    return int(cfg.MODEL.FPN.IN_FEATURES[0][3:])


def to_detectron2(weights: Mapping[str, Tensor], lowest_level: int = 2) -> Weights:
    """Our weights under Detectron2's names.

    Args:
        weights: a ``state_dict`` of :class:`~.rcnn.GeneralizedRCNN`.
        lowest_level: ``l`` of the finest pyramid level ``p{l}``.

    Raises:
        CheckpointError: a name that no rule covers.
    """
    # One convolution alone has no number there.
    one = not any(name.startswith("rpn.head.conv.1.") for name in weights)
    rules = [rule for rule in _rules(lowest_level) if not (one and "rpn.head.conv.#" in rule[0])]
    return {
        _renamed(name, rules, back=False, problem="has no counterpart in Detectron2's FPN R-CNN"): value
        for name, value in weights.items()
    }


def from_detectron2(weights: Mapping[str, Tensor], lowest_level: int = 2) -> Weights:
    """Detectron2's weights under our names; what is no weight (anchors, pixel mean) is left out.

    Raises:
        CheckpointError: a name that no rule covers: another architecture than FPN R-CNN.
    """
    rules, problem = _rules(lowest_level), "has no counterpart in the built-in engine's FPN R-CNN"
    return {
        _renamed(name, rules, back=True, problem=problem): value
        for name, value in weights.items()
        if not _CONSTANTS.search(name)
    }


def _rules(lowest: int) -> list[tuple[str, str, int, int]]:
    """All rules; the pyramid's levels count from ``lowest`` there, from 0 here."""
    pyramid = [
        (f"backbone.fpn.{ours}_blocks.#.{number}.*", f"backbone.fpn_{theirs}#.{norm}*", 1, lowest)
        for ours, theirs in (("inner", "lateral"), ("layer", "output"))
        for number, norm in ((0, ""), (1, "norm."))
    ]
    return [*_RULES, *pyramid]


def _renamed(name: str, rules: list[tuple[str, str, int, int]], *, back: bool, problem: str) -> str:
    """``name`` as the other side calls it, by the first rule that it follows; ``back``: it is Detectron2's.

    Raises:
        CheckpointError: it follows none.
    """
    for ours, theirs, scale, offset in rules:
        given, wanted = (theirs, ours) if back else (ours, theirs)
        pattern = re.escape(given).replace(r"\#", r"(\d+)").replace(r"\*", r"([a-z_]+)")
        if match := re.fullmatch(pattern, name):
            parts = list(match.groups())
            if parts and parts[0].isdigit():
                first = int(parts[0])
                parts[0] = str((first - offset) * scale if back else first // scale + offset)
            return re.sub(r"[#*]", "{}", wanted).format(*parts)
    raise CheckpointError(f"weight {name!r} {problem}: it can't be converted")


def from_caffe2_resnet(weights: Mapping[str, Tensor]) -> Weights:
    """An ImageNet ResNet of Detectron2's model zoo with Caffe2 names (``res2_0_branch2a_w``) as our backbone.

    Those files hold batch norms folded to a scale and a bias, so mean 0 and variance 1 are put beside them.

    Raises:
        CheckpointError: a name that no rule covers.
    """
    result: Weights = {}
    for name, value in weights.items():
        if name.startswith(("fc1000", "pred")):
            continue
        ours = _renamed(name, _CAFFE2_RULES, back=True, problem="is no part of a Caffe2 ResNet")
        result[ours] = value
        if re.search(r"(bn\d|downsample\.1)\.weight$", ours):
            stem = ours.removesuffix("weight")
            result[f"{stem}running_mean"] = torch.zeros_like(value)
            result[f"{stem}running_var"] = torch.ones_like(value)
    return result


def from_torchvision_resnet(
    weights: Mapping[str, Tensor], image_format: str, pixel_std: list[float]
) -> Weights:
    """torchvision's ImageNet classifier as our backbone, its first layer adapted to the configured input.

    torchvision's weights expect RGB divided by ImageNet's standard deviations; Detectron2's usual input is BGR,
    not divided. Reversing the first layer's channels and dividing them by the deviations is exactly equivalent.

    Args:
        weights: of ``torchvision.models.resnet*``.
        image_format: ``INPUT.FORMAT``.
        pixel_std: ``MODEL.PIXEL_STD``, in the order of ``image_format``.
    """
    result = {f"backbone.body.{k}": v for k, v in weights.items() if not k.startswith("fc.")}
    first = result["backbone.body.conv1.weight"].clone()
    std = torch.tensor(TORCHVISION_STD)
    if image_format == "BGR":
        first, std = first.flip(1), std.flip(0)
    result["backbone.body.conv1.weight"] = first * (torch.tensor(pixel_std) / std).view(1, -1, 1, 1)
    return result


def from_torchvision_detector(weights: Mapping[str, Tensor], num_classes: int) -> Weights:
    """torchvision's R-CNN under our names, the background moved from the first class to the last.

    torchvision's COCO models have 91 outputs, one per category id, gaps included; for 80 classes the used
    ones are picked.

    Args:
        num_classes: of our model, without the background.
    """
    result: Weights = {}
    for name, value in weights.items():
        name = name.replace("box_head.fc6.", "box_head.fc1.").replace("box_head.fc7.", "box_head.fc2.")
        name = re.sub(r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", name)
        name = re.sub(r"(mask_head)\.mask_fcn(\d)\.", lambda m: f"{m[1]}.{int(m[2]) - 1}.0.", name)
        name = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", name)
        result[name] = value
    outputs = result["roi_heads.box_predictor.cls_score.weight"].shape[0]
    ids = list(COCO_CATEGORY_IDS) if (outputs, num_classes) == (91, 80) else list(range(1, outputs))
    for kind in ("weight", "bias"):
        scores = result[f"roi_heads.box_predictor.cls_score.{kind}"]
        result[f"roi_heads.box_predictor.cls_score.{kind}"] = scores[[*ids, 0]]
        boxes = result[f"roi_heads.box_predictor.bbox_pred.{kind}"]
        result[f"roi_heads.box_predictor.bbox_pred.{kind}"] = boxes.unflatten(0, (outputs, 4))[ids].flatten(
            0, 1
        )
        masks = result.get(f"roi_heads.mask_predictor.mask_fcn_logits.{kind}")
        if masks is not None:
            result[f"roi_heads.mask_predictor.mask_fcn_logits.{kind}"] = masks[ids]
    return result
