"""What of Detectron2's configuration this engine can do; the rest is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zenith_det.config import CfgNode, LoadedConfig, get_cfg
from zenith_det.config.keys import leaves, plain
from zenith_det.data.pixel_formats import CHANNELS
from zenith_det.engines.torchvision_engine.backbone import NORM_LAYERS, RESNETS, STAGES
from zenith_det.engines.torchvision_engine.box_regression import LOSS_TYPES
from zenith_det.engines.torchvision_engine.datasets import SAMPLERS
from zenith_det.errors import ConfigError

REMEDY = "the torchvision engine can't honour it; --engine detectron2 does"

# Sections and keys that this engine reads, with every value that Detectron2 gives a meaning to.
_READ = {
    "MODEL": (
        "MASK_ON KEYPOINT_ON DEVICE WEIGHTS WEIGHTS_ALLOW_MISMATCH CHANNELS_LAST COMPILE_BACKBONE "
        "PIXEL_MEAN PIXEL_STD BACKBONE.FREEZE_AT FPN.IN_FEATURES FPN.OUT_CHANNELS "
        "PROPOSAL_GENERATOR.MIN_SIZE ANCHOR_GENERATOR.SIZES ANCHOR_GENERATOR.ASPECT_RATIOS "
        "ANCHOR_GENERATOR.OFFSET RPN. ROI_HEADS. ROI_BOX_HEAD. ROI_MASK_HEAD. ROI_KEYPOINT_HEAD. "
        "RESNETS.DEPTH RESNETS.NORM RESNETS.STRIDE_IN_1X1 RESNETS.RES2_OUT_CHANNELS RESNETS.OUT_FEATURES"
    ),
    "INPUT": (
        "MIN_SIZE_TRAIN MIN_SIZE_TRAIN_SAMPLING MAX_SIZE_TRAIN MIN_SIZE_TEST MAX_SIZE_TEST RANDOM_FLIP "
        "FORMAT MASK_FORMAT VALUE_RANGE CROP. AUGMENTATIONS"
    ),
    "DATALOADER": (
        "NUM_WORKERS ASPECT_RATIO_GROUPING FILTER_EMPTY_ANNOTATIONS SAMPLER_TRAIN REPEAT_THRESHOLD "
        "REPEAT_SQRT"
    ),
    "TEST": (
        "EVAL_PERIOD EXPECTED_RESULTS KEYPOINT_OKS_SIGMAS DETECTIONS_PER_IMAGE AUG. MAX_IMAGES "
        "VALIDATION_LOSS EARLY_STOPPING PATIENCE"
    ),
}
HONOURED = (
    "DATASETS.", "SOLVER.", "CHECKPOINT.", "RECOVERY.",
    "VERSION", "LOGGERS", "DETERMINISTIC", "OUTPUT_DIR", "SEED", "CUDNN_BENCHMARK", "FLOAT32_PRECISION",
    "VIS_PERIOD",
    *(f"{section}.{name}" for section, names in _READ.items() for name in names.split()),
)  # fmt: skip

# Of those, and of keys whose default belongs to another model, the values that this engine knows.
ALLOWED: dict[str, Callable[[Any, CfgNode], bool]] = {
    "MODEL.META_ARCHITECTURE": lambda v, _: v == "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": lambda v, _: v == "build_resnet_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": lambda v, _: 0 <= v <= 5,
    "MODEL.FPN.IN_FEATURES": lambda v, _: _consecutive_stages(v),
    "MODEL.RESNETS.OUT_FEATURES": lambda v, cfg: list(v) == list(cfg.MODEL.FPN.IN_FEATURES),
    "MODEL.FPN.NORM": lambda v, _: v in ("", *NORM_LAYERS),
    "MODEL.FPN.FUSE_TYPE": lambda v, _: v == "sum",
    "MODEL.PROPOSAL_GENERATOR.NAME": lambda v, _: v == "RPN",
    "MODEL.ANCHOR_GENERATOR.NAME": lambda v, _: v == "DefaultAnchorGenerator",
    "MODEL.RPN.HEAD_NAME": lambda v, _: v == "StandardRPNHead",
    "MODEL.RPN.IN_FEATURES": lambda v, cfg: set(v) <= set(_pyramid(cfg)),
    "MODEL.RPN.BOUNDARY_THRESH": lambda v, _: v < 0,
    "MODEL.RPN.IOU_LABELS": lambda v, _: list(v) == [0, -1, 1],
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": lambda v, _: v in LOSS_TYPES,
    "MODEL.RPN.CONV_DIMS": lambda v, _: all(d == -1 for d in v),
    "MODEL.ROI_HEADS.NAME": lambda v, _: v == "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": lambda v, cfg: len(v) > 0 and set(v) <= set(_pyramid(cfg)[:-1]),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": lambda v, _: len(v) == 1,
    "MODEL.ROI_HEADS.IOU_LABELS": lambda v, _: list(v) == [0, 1],
    "MODEL.ROI_BOX_HEAD.NAME": lambda v, _: v == "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": lambda v, _: v in LOSS_TYPES,
    "MODEL.ROI_BOX_HEAD.NORM": lambda v, _: v in ("", *NORM_LAYERS),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": lambda v, _: v in ("ROIAlign", "ROIAlignV2"),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": lambda v, _: not v,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": lambda v, _: not v,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": lambda v, _: not v,
    "MODEL.ROI_MASK_HEAD.NAME": lambda v, _: v == "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NORM": lambda v, _: v in ("", *NORM_LAYERS),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": lambda v, _: v in ("ROIAlign", "ROIAlignV2"),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": lambda v, _: v == "KRCNNConvDeconvUpsampleHead",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": lambda v, _: v in ("ROIAlign", "ROIAlignV2"),
    "MODEL.RESNETS.DEPTH": lambda v, _: v in RESNETS,
    "MODEL.RESNETS.NORM": lambda v, _: v in NORM_LAYERS,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": lambda v, cfg: (
        v == (64 if cfg.MODEL.RESNETS.DEPTH in (18, 34) else 256)
    ),
    "INPUT.FORMAT": lambda v, _: v in CHANNELS,
    "INPUT.MASK_FORMAT": lambda v, _: v in ("polygon", "bitmask"),
    "INPUT.RANDOM_FLIP": lambda v, _: v in ("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": lambda v, _: v in ("choice", "range"),
    "DATALOADER.SAMPLER_TRAIN": lambda v, _: v in SAMPLERS,
    "DATASETS.PROPOSAL_FILES_TRAIN": lambda v, _: len(v) == 0,
    "DATASETS.PROPOSAL_FILES_TEST": lambda v, _: len(v) == 0,
    "SOLVER.REFERENCE_WORLD_SIZE": lambda v, _: v == 0,
}
# Changed or not, they change nothing that this engine, or Detectron2 with the same model, computes.
WITHOUT_EFFECT = ("GLOBAL.HACK", "MODEL.RETINANET.NUM_CLASSES")


def check_supported(loaded: LoadedConfig) -> None:
    """Refuse the first key that this engine can't honour.

    Raises:
        ConfigError: naming the key, its value, the file that set it and what would honour it.
    """
    cfg = loaded.cfg
    defaults = dict(leaves(get_cfg()))
    for key, value in leaves(cfg):
        if key in ALLOWED:
            supported = ALLOWED[key](value, cfg)
        elif key in WITHOUT_EFFECT or any(_under(key, prefix) for prefix in HONOURED):
            supported = True
        else:
            supported = key in defaults and plain(value) == plain(defaults[key])
        if not supported:
            source = loaded.sources.get(key, "its default")
            refusal = f"{key} = {value!r} ({source}): {REMEDY}"
            if loaded.config_file is None and key not in loaded.sources:
                refusal = (
                    "no --config-file was given, and the defaults are those of Detectron2, a C4 model: give one, such "
                    f"as mask_rcnn_zenith.yaml ({refusal})"
                )
            raise ConfigError(refusal)
    _check_levels(loaded)


def _check_levels(loaded: LoadedConfig) -> None:
    cfg = loaded.cfg
    levels = len(cfg.MODEL.RPN.IN_FEATURES)
    for name in ("SIZES", "ASPECT_RATIOS"):
        given = len(cfg.MODEL.ANCHOR_GENERATOR[name])
        if given not in (1, levels):
            key = f"MODEL.ANCHOR_GENERATOR.{name}"
            raise ConfigError(
                f"{key} has {given} entries ({loaded.sources.get(key, 'its default')}) for {levels} levels in "
                "MODEL.RPN.IN_FEATURES: give one entry, or one per level"
            )


def _consecutive_stages(names: Sequence[str]) -> bool:
    runs = (STAGES[i:j] for i in range(len(STAGES)) for j in range(i + 1, len(STAGES) + 1))
    return tuple(names) in runs


def _pyramid(cfg: CfgNode) -> list[str]:
    names = [f"p{name[3:]}" for name in cfg.MODEL.FPN.IN_FEATURES]
    return [*names, f"p{int(names[-1][1:]) + 1}"] if names else []


def _under(key: str, prefix: str) -> bool:
    return key.startswith(prefix) if prefix.endswith(".") else key == prefix
