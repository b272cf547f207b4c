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

# (ours, Detectron2's) as (pattern, replacement) pairs, each the inverse of the other. {n} is the stage.
_RENAMES: tuple[tuple[str, str, str, str], ...] = (
    (r"^backbone\.body\.conv1\.", "backbone.body.conv1.",
     r"^backbone\.bottom_up\.stem\.conv1\.(?!norm\.)", "backbone.bottom_up.stem.conv1."),
    (r"^backbone\.body\.bn1\.", "backbone.body.bn1.",
     r"^backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.bottom_up.stem.conv1.norm."),
    (r"^rpn\.head\.cls_logits\.", "rpn.head.cls_logits.",
     r"^proposal_generator\.rpn_head\.objectness_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.head.bbox_pred.",
     r"^proposal_generator\.rpn_head\.anchor_deltas\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_heads.mask_predictor.conv5_mask.",
     r"^roi_heads\.mask_head\.deconv\.", "roi_heads.mask_head.deconv."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_heads.mask_predictor.mask_fcn_logits.",
     r"^roi_heads\.mask_head\.predictor\.", "roi_heads.mask_head.predictor."),
    (r"^roi_heads\.keypoint_predictor\.kps_score_lowres\.", "roi_heads.keypoint_predictor.kps_score_lowres.",
     r"^roi_heads\.keypoint_head\.score_lowres\.", "roi_heads.keypoint_head.score_lowres."),
)  # fmt: skip

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
    rpn_convs = {k.split(".")[3] for k in weights if k.startswith("rpn.head.conv.")}
    return {_to_detectron2(k, lowest_level, len(rpn_convs)): v for k, v in weights.items()}


def from_detectron2(weights: Mapping[str, Tensor], lowest_level: int = 2) -> Weights:
    """Detectron2's weights under our names; what is no weight (anchors, pixel mean) is left out.

    Raises:
        CheckpointError: a name that no rule covers: another architecture than FPN R-CNN.
    """
    return {_from_detectron2(k, lowest_level): v for k, v in weights.items() if not _CONSTANTS.search(k)}


def is_detectron2(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are Detectron2's."""
    return any(k.startswith(("backbone.bottom_up.", "proposal_generator.")) for k in weights)


def _to_detectron2(name: str, lowest: int, rpn_convs: int) -> str:
    for pattern, _, _, theirs in _RENAMES:
        if re.match(pattern, name):
            return re.sub(pattern, theirs, name)
    if m := re.match(r"backbone\.body\.layer(\d)\.(\d+)\.(.+)$", name):
        return f"backbone.bottom_up.res{int(m[1]) + 1}.{m[2]}.{_block_to_detectron2(m[3])}"
    if m := re.match(r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.([01])\.(.+)$", name):
        kind = "lateral" if m[1] == "inner" else "output"
        return f"backbone.fpn_{kind}{int(m[2]) + lowest}.{'norm.' if m[3] == '1' else ''}{m[4]}"
    if m := re.match(r"rpn\.head\.conv\.(\d+)\.0\.(.+)$", name):
        number = f"conv{m[1]}." if rpn_convs > 1 else ""
        return f"proposal_generator.rpn_head.conv.{number}{m[2]}"
    if m := re.match(r"roi_heads\.box_head\.conv(\d+)\.([01])\.(.+)$", name):
        return f"roi_heads.box_head.conv{m[1]}.{'norm.' if m[2] == '1' else ''}{m[3]}"
    if re.match(r"roi_heads\.(box_head\.fc\d+|box_predictor\.(cls_score|bbox_pred))\.", name):
        return name
    if m := re.match(r"roi_heads\.mask_head\.(\d+)\.([01])\.(.+)$", name):
        return f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.{'norm.' if m[2] == '1' else ''}{m[3]}"
    if m := re.match(r"roi_heads\.keypoint_head\.(\d+)\.(.+)$", name):
        return f"roi_heads.keypoint_head.conv_fcn{int(m[1]) // 2 + 1}.{m[2]}"
    raise CheckpointError(
        f"weight {name!r} has no counterpart in Detectron2's FPN R-CNN: it can't be converted"
    )


def _from_detectron2(name: str, lowest: int) -> str:
    for _, ours, pattern, _ in _RENAMES:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    if m := re.match(r"backbone\.bottom_up\.res(\d)\.(\d+)\.(.+)$", name):
        return f"backbone.body.layer{int(m[1]) - 1}.{m[2]}.{_block_from_detectron2(m[3])}"
    if m := re.match(r"backbone\.fpn_(lateral|output)(\d)\.(norm\.)?(.+)$", name):
        kind = "inner" if m[1] == "lateral" else "layer"
        return f"backbone.fpn.{kind}_blocks.{int(m[2]) - lowest}.{1 if m[3] else 0}.{m[4]}"
    if m := re.match(r"proposal_generator\.rpn_head\.conv\.(?:conv(\d+)\.)?(weight|bias)$", name):
        return f"rpn.head.conv.{m[1] or 0}.0.{m[2]}"
    if m := re.match(r"roi_heads\.box_head\.conv(\d+)\.(norm\.)?(.+)$", name):
        return f"roi_heads.box_head.conv{m[1]}.{1 if m[2] else 0}.{m[3]}"
    if re.match(r"roi_heads\.(box_head\.fc\d+|box_predictor\.(cls_score|bbox_pred))\.", name):
        return name
    if m := re.match(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(norm\.)?(.+)$", name):
        return f"roi_heads.mask_head.{int(m[1]) - 1}.{1 if m[2] else 0}.{m[3]}"
    if m := re.match(r"roi_heads\.keypoint_head\.conv_fcn(\d+)\.(.+)$", name):
        return f"roi_heads.keypoint_head.{2 * (int(m[1]) - 1)}.{m[2]}"
    raise CheckpointError(
        f"weight {name!r} has no counterpart in the built-in engine's FPN R-CNN: it can't be converted"
    )


def _block_to_detectron2(rest: str) -> str:
    rest = re.sub(r"^bn(\d)\.", r"conv\1.norm.", rest)
    rest = re.sub(r"^downsample\.0\.", "shortcut.", rest)
    return re.sub(r"^downsample\.1\.", "shortcut.norm.", rest)


def _block_from_detectron2(rest: str) -> str:
    rest = re.sub(r"^conv(\d)\.norm\.", r"bn\1.", rest)
    rest = re.sub(r"^shortcut\.norm\.", "downsample.1.", rest)
    return re.sub(r"^shortcut\.", "downsample.0.", rest)


def from_caffe2_resnet(weights: Mapping[str, Tensor]) -> Weights:
    """An ImageNet ResNet of Detectron2's model zoo with Caffe2 names (``res2_0_branch2a_w``) as our backbone.

    Those files hold batch norms folded to a scale and a bias, so mean 0 and variance 1 are put beside them.
    """
    result: Weights = {}
    for name, value in weights.items():
        if name.startswith(("fc1000", "pred")):
            continue
        target = _caffe2_name(name)
        if target is None:
            raise CheckpointError(f"weight {name!r} is no part of a Caffe2 ResNet: it can't be converted")
        result[f"backbone.body.{target}"] = value
        if target.endswith(".weight") and re.search(r"(bn\d|downsample\.1)\.weight$", target):
            stem = f"backbone.body.{target.removesuffix('weight')}"
            result[f"{stem}running_mean"] = torch.zeros_like(value)
            result[f"{stem}running_var"] = torch.ones_like(value)
    return result


def is_caffe2_resnet(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are Caffe2's."""
    return "conv1_w" in weights


def _caffe2_name(name: str) -> str | None:
    if name in ("conv1_w", "conv1_b"):
        return "conv1.weight" if name == "conv1_w" else None
    suffix = {"s": "weight", "b": "bias"}
    if m := re.match(r"res_conv1_bn_([sb])$", name):
        return f"bn1.{suffix[m[1]]}"
    m = re.match(r"res(\d)_(\d+)_branch(1|2[abc])(_bn_s|_bn_b|_w)$", name)
    if m is None:
        return None
    block = f"layer{int(m[1]) - 1}.{m[2]}"
    if m[3] == "1":
        conv, norm = "downsample.0", "downsample.1"
    else:
        number = "abc".index(m[3][1]) + 1
        conv, norm = f"conv{number}", f"bn{number}"
    return f"{block}.{conv}.weight" if m[4] == "_w" else f"{block}.{norm}.{suffix[m[4][-1]]}"


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


def is_torchvision_resnet(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of torchvision's classifiers."""
    return "conv1.weight" in weights and "layer1.0.conv1.weight" in weights


def is_torchvision_detector(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of torchvision's Faster, Mask or Keypoint R-CNN."""
    return "roi_heads.box_head.fc6.weight" in weights


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
