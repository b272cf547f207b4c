"""Every configuration key and its default: Detectron2's, then this toolkit's own.

Detectron2's keys and values are those of ``detectron2/config/defaults.py`` at 02b5c4e; a test compares them
one by one. The comments here say what a value means where the name doesn't; Detectron2's documentation has
the rest.
"""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode as FvcoreCfgNode

DETECTRON2_DEFAULTS: dict[str, Any] = {
    "VERSION": 2,  # the layout of the keys; a file that says another number is refused
    "MODEL": {
        "LOAD_PROPOSALS": False,
        "MASK_ON": False,
        "KEYPOINT_ON": False,
        "DEVICE": "cuda",  # "cpu", "cuda", "cuda:1" …; this toolkit adds "auto"
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "WEIGHTS": "",  # "" trains from scratch
        "PIXEL_MEAN": [103.53, 116.28, 123.675],  # in the order of INPUT.FORMAT, 0..255
        "PIXEL_STD": [1.0, 1.0, 1.0],  # 1 where the weights have absorbed it (MSRA's do)
        "BACKBONE": {
            "NAME": "build_resnet_backbone",
            "FREEZE_AT": 2,  # stages without training: 0 none, 1 the stem, 2 the stem and res2 …
        },
        "FPN": {
            "IN_FEATURES": [],
            "OUT_CHANNELS": 256,
            "NORM": "",
            "FUSE_TYPE": "sum",  # or "avg"
        },
        "PROPOSAL_GENERATOR": {
            "NAME": "RPN",
            "MIN_SIZE": 0,
        },
        "ANCHOR_GENERATOR": {
            "NAME": "DefaultAnchorGenerator",
            "SIZES": [[32, 64, 128, 256, 512]],
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],  # height / width
            "ANGLES": [[-90, 0, 90]],
            "OFFSET": 0.0,  # of the first anchor's centre, in strides, [0, 1)
        },
        "RPN": {
            "HEAD_NAME": "StandardRPNHead",
            "IN_FEATURES": ["res4"],
            "BOUNDARY_THRESH": -1,  # pixels outside the image an anchor may reach; -1: any
            "IOU_THRESHOLDS": [0.3, 0.7],  # below: background; above: object; between: left out
            "IOU_LABELS": [0, -1, 1],
            "BATCH_SIZE_PER_IMAGE": 256,
            "POSITIVE_FRACTION": 0.5,
            "BBOX_REG_LOSS_TYPE": "smooth_l1",
            "BBOX_REG_LOSS_WEIGHT": 1.0,
            "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
            "SMOOTH_L1_BETA": 0.0,
            "LOSS_WEIGHT": 1.0,
            "PRE_NMS_TOPK_TRAIN": 12000,  # per FPN level
            "PRE_NMS_TOPK_TEST": 6000,
            "POST_NMS_TOPK_TRAIN": 2000,  # per image
            "POST_NMS_TOPK_TEST": 1000,
            "NMS_THRESH": 0.7,
            "CONV_DIMS": [-1],  # -1: as many channels as the input
        },
        "ROI_HEADS": {
            "NAME": "Res5ROIHeads",
            "NUM_CLASSES": 80,  # without background
            "IN_FEATURES": ["res4"],
            "IOU_THRESHOLDS": [0.5],
            "IOU_LABELS": [0, 1],
            "BATCH_SIZE_PER_IMAGE": 512,  # sampled regions
            "POSITIVE_FRACTION": 0.25,
            "SCORE_THRESH_TEST": 0.05,
            "NMS_THRESH_TEST": 0.5,
            "PROPOSAL_APPEND_GT": True,
        },
        "ROI_BOX_HEAD": {
            "NAME": "",
            "BBOX_REG_LOSS_TYPE": "smooth_l1",
            "BBOX_REG_LOSS_WEIGHT": 1.0,
            "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
            "SMOOTH_L1_BETA": 0.0,  # 0 is L1
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,  # 0: adaptive
            "POOLER_TYPE": "ROIAlignV2",
            "NUM_FC": 0,
            "FC_DIM": 1024,
            "NUM_CONV": 0,
            "CONV_DIM": 256,
            "NORM": "",
            "CLS_AGNOSTIC_BBOX_REG": False,
            "TRAIN_ON_PRED_BOXES": False,
            "USE_FED_LOSS": False,
            "USE_SIGMOID_CE": False,
            "FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
            "FED_LOSS_NUM_CLASSES": 50,
        },
        "ROI_BOX_CASCADE_HEAD": {
            "BBOX_REG_WEIGHTS": (
                (10.0, 10.0, 5.0, 5.0),
                (20.0, 20.0, 10.0, 10.0),
                (30.0, 30.0, 15.0, 15.0),
            ),
            "IOUS": (0.5, 0.6, 0.7),
        },
        "ROI_MASK_HEAD": {
            "NAME": "MaskRCNNConvUpsampleHead",
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
            "NUM_CONV": 0,
            "CONV_DIM": 256,
            "NORM": "",
            "CLS_AGNOSTIC_MASK": False,
            "POOLER_TYPE": "ROIAlignV2",
        },
        "ROI_KEYPOINT_HEAD": {
            "NAME": "KRCNNConvDeconvUpsampleHead",
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
            "CONV_DIMS": (512, 512, 512, 512, 512, 512, 512, 512),
            "NUM_KEYPOINTS": 17,
            "MIN_KEYPOINTS_PER_IMAGE": 1,  # images with fewer visible ones are left out of training
            "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,  # LOSS_WEIGHT 1.0 goes with True, 4.0 with False
            "LOSS_WEIGHT": 1.0,
            "POOLER_TYPE": "ROIAlignV2",
        },
        "SEM_SEG_HEAD": {
            "NAME": "SemSegFPNHead",
            "IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "IGNORE_VALUE": 255,
            "NUM_CLASSES": 54,
            "CONVS_DIM": 128,
            "COMMON_STRIDE": 4,
            "NORM": "GN",
            "LOSS_WEIGHT": 1.0,
        },
        "PANOPTIC_FPN": {
            "INSTANCE_LOSS_WEIGHT": 1.0,
            "COMBINE": {
                "ENABLED": True,
                "OVERLAP_THRESH": 0.5,
                "STUFF_AREA_LIMIT": 4096,
                "INSTANCES_CONFIDENCE_THRESH": 0.5,
            },
        },
        "RETINANET": {
            "NUM_CLASSES": 80,
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
            "NUM_CONVS": 4,
            "IOU_THRESHOLDS": [0.4, 0.5],
            "IOU_LABELS": [0, -1, 1],
            "PRIOR_PROB": 0.01,  # of an object, which sets the classifier's bias
            "SCORE_THRESH_TEST": 0.05,
            "TOPK_CANDIDATES_TEST": 1000,
            "NMS_THRESH_TEST": 0.5,
            "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
            "FOCAL_LOSS_GAMMA": 2.0,
            "FOCAL_LOSS_ALPHA": 0.25,
            "SMOOTH_L1_LOSS_BETA": 0.1,
            "BBOX_REG_LOSS_TYPE": "smooth_l1",
            "NORM": "",
        },
        "RESNETS": {
            "DEPTH": 50,
            "OUT_FEATURES": ["res4"],
            "NUM_GROUPS": 1,
            "NORM": "FrozenBN",  # or "BN", "SyncBN", "GN"
            "WIDTH_PER_GROUP": 64,
            "STRIDE_IN_1X1": True,  # MSRA's weights; False for torchvision's
            "RES5_DILATION": 1,
            "RES2_OUT_CHANNELS": 256,  # 64 for depth 18 and 34
            "STEM_OUT_CHANNELS": 64,
            "DEFORM_ON_PER_STAGE": [False, False, False, False],
            "DEFORM_MODULATED": False,
            "DEFORM_NUM_GROUPS": 1,
        },
    },
    "INPUT": {
        "MIN_SIZE_TRAIN": (800,),  # of the shorter side, pixels
        "MIN_SIZE_TRAIN_SAMPLING": "choice",  # one of the sizes; "range": anything between two
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,  # 0: no resizing
        "MAX_SIZE_TEST": 1333,
        "RANDOM_FLIP": "horizontal",  # or "vertical", "none"
        "CROP": {
            "ENABLED": False,
            "TYPE": "relative_range",  # or "relative", "absolute", "absolute_range"
            "SIZE": [0.9, 0.9],
        },
        "FORMAT": "BGR",
        "MASK_FORMAT": "polygon",  # or "bitmask"
    },
    "DATASETS": {
        "TRAIN": (),
        "PROPOSAL_FILES_TRAIN": (),
        "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
        "TEST": (),
        "PROPOSAL_FILES_TEST": (),
        "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
    },
    "DATALOADER": {
        "NUM_WORKERS": 4,
        "ASPECT_RATIO_GROUPING": True,
        "SAMPLER_TRAIN": "TrainingSampler",
        "REPEAT_THRESHOLD": 0.0,
        "REPEAT_SQRT": True,
        "FILTER_EMPTY_ANNOTATIONS": True,
    },
    "SOLVER": {
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",  # a name in LR_SCHEDULER_REGISTRY
        "MAX_ITER": 40000,
        "BASE_LR": 0.001,
        "BASE_LR_END": 0.0,  # WarmupCosineLR only
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,  # of the affine parameters of norm layers
        "GAMMA": 0.1,
        "STEPS": (30000,),  # iterations at which the LR is multiplied by GAMMA
        "NUM_DECAYS": 3,  # WarmupStepWithFixedGammaLR only
        "WARMUP_FACTOR": 0.001,  # the LR starts at BASE_LR times this
        "WARMUP_ITERS": 1000,
        "WARMUP_METHOD": "linear",  # or "constant"
        "RESCALE_INTERVAL": False,  # True: the schedule after the warm-up starts at its own beginning
        "CHECKPOINT_PERIOD": 5000,  # iterations
        "IMS_PER_BATCH": 16,  # over all processes
        "REFERENCE_WORLD_SIZE": 0,  # processes that the numbers here are meant for; 0: no scaling
        "BIAS_LR_FACTOR": 1.0,
        "WEIGHT_DECAY_BIAS": None,  # None: WEIGHT_DECAY
        "CLIP_GRADIENTS": {
            "ENABLED": False,
            "CLIP_TYPE": "value",  # "value", "norm" (of each parameter); this toolkit adds "full_model"
            "CLIP_VALUE": 1.0,
            "NORM_TYPE": 2.0,
        },
        "AMP": {
            "ENABLED": False,
        },
    },
    "TEST": {
        "EXPECTED_RESULTS": [],  # [[task, metric, value, tolerance], …]
        "EVAL_PERIOD": 0,  # iterations; 0: only at the end
        "KEYPOINT_OKS_SIGMAS": [],  # one per keypoint; []: COCO's
        "DETECTIONS_PER_IMAGE": 100,
        "AUG": {
            "ENABLED": False,
            "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
            "MAX_SIZE": 4000,
            "FLIP": True,
        },
        "PRECISE_BN": {
            "ENABLED": False,
            "NUM_ITER": 200,
        },
    },
    "OUTPUT_DIR": "./output",
    "SEED": -1,  # negative: another one each run
    "CUDNN_BENCHMARK": False,
    "FLOAT32_PRECISION": "",  # "highest", "high", "medium"; "": torch's default
    "VIS_PERIOD": 0,  # iterations between pictures of proposals and masks in TensorBoard; 0: none
    "GLOBAL": {
        "HACK": 1.0,
    },
}

# Names that keys had before version 2 (``detectron2/config/compat.py``), with what they became.
RENAMED_KEYS: dict[str, str] = {
    "MODEL.WEIGHT": "MODEL.WEIGHTS",
    "MODEL.RPN_HEAD.NAME": "MODEL.RPN.HEAD_NAME",
    "MODEL.PANOPTIC_FPN.SEMANTIC_LOSS_SCALE": "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.RPN_LOSS_SCALE": "MODEL.RPN.LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_SCALE": "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.COMBINE_ON": "MODEL.PANOPTIC_FPN.COMBINE.ENABLED",
    "MODEL.PANOPTIC_FPN.COMBINE_OVERLAP_THRESHOLD": "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
    "MODEL.PANOPTIC_FPN.COMBINE_STUFF_AREA_LIMIT": "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT",
    "MODEL.PANOPTIC_FPN.COMBINE_INSTANCES_CONFIDENCE_THRESHOLD": (
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH"
    ),
    "MODEL.ROI_HEADS.SCORE_THRESH": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.ROI_HEADS.NMS": "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "MODEL.RETINANET.INFERENCE_SCORE_THRESHOLD": "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.RETINANET.INFERENCE_TOPK_CANDIDATES": "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
    "MODEL.RETINANET.INFERENCE_NMS_THRESHOLD": "MODEL.RETINANET.NMS_THRESH_TEST",
    "TEST.DETECTIONS_PER_IMG": "TEST.DETECTIONS_PER_IMAGE",
    "TEST.AUG_ON": "TEST.AUG.ENABLED",
    "TEST.AUG_MIN_SIZES": "TEST.AUG.MIN_SIZES",
    "TEST.AUG_MAX_SIZE": "TEST.AUG.MAX_SIZE",
    "TEST.AUG_FLIP": "TEST.AUG.FLIP",
}

# Of our own: what concerns every optimizer, and once stood in ZENITH's section. Both names work.
MOVED_KEYS: dict[str, str] = {
    "SOLVER.ZENITH.AUTO_LR": "SOLVER.AUTO_LR",
    "SOLVER.ZENITH.MAX_NONFINITE_STEPS": "SOLVER.MAX_NONFINITE_STEPS",
}

ZENITH_DEFAULTS: dict[str, Any] = {
    "MODEL": {
        # True: weights of another shape (heads for other classes) are left out, not an error.
        "WEIGHTS_ALLOW_MISMATCH": False,
        "CHANNELS_LAST": False,  # True: the channels innermost in memory, as GPUs with AMP want them
        "COMPILE_BACKBONE": False,  # True: torch.compile for the backbone; needs a C++ compiler, or Triton on a GPU
    },
    "INPUT": {
        # The values of images of more than 8 bits that become black and white; (): as suits the training set.
        "VALUE_RANGE": (),
        # Names of torchvision.transforms.v2, or one name with its arguments each, in their order, on an image that has
        # been resized and flipped: [{"ColorJitter": {"brightness": 0.3}}, {"RandomRotation": {"degrees": 10}}]
        "AUGMENTATIONS": [],
    },
    "DATASETS": {
        # A COCO-format set by its files, in place of the names in TRAIN and TEST. ``--train-json`` and
        # its like write them here, so that the config.yaml of a run alone is enough to evaluate it.
        "TRAIN_JSON": "",
        "TRAIN_IMAGES": "",
        "VAL_JSON": "",
        "VAL_IMAGES": "",
        "VAL_SHARE": 0.0,  # of the training set's images, to hold out and evaluate on; 0: none
        "MAX_BAD_IMAGES": 0,  # missing or unreadable images that are left out rather than stop the run
        "CROWDS": "auto",  # iscrowd 1 as "regions", as in COCO, as "objects", or as what the whole set says
        "CACHE": True,  # keep what a large annotation file came to, in $ZENITH_DET_CACHE or ~/.cache/zenith_det
        "STRICT": False,  # True: stop at what could be dropped or looks suspicious, rather than go on and tell
    },
    "SOLVER": {
        "OPTIMIZER": "ZENITH",  # a name in OPTIMIZER_REGISTRY
        "AUTO_LR": False,  # True: BASE_LR comes from an LR range test before the run
        "MAX_NONFINITE_STEPS": 50,  # skipped in a row before the run goes back, or stops
        "AMP": {
            "DTYPE": "float16",  # or "bfloat16", which needs no loss scaling and works on the CPU, too
        },
        "PLATEAU_PATIENCE": 2,  # WarmupPlateauLR: evaluations without a better AP that leave the LR as it is
        "GRADIENT_ACCUMULATION": 1,  # parts that a batch of IMS_PER_BATCH is taken in, per step
        "ZENITH": {
            "WINDOW": 100,  # W: gradient norms that are averaged, in iterations
            "MIN_RATIO": 0.0,  # r_min: the least that the LR is multiplied by
            "NORM_SOURCE": "gradient",  # or "momentum": the norm of the momentum buffer
            "RECORD_AFTER": 0,  # iterations whose norms are left out, the warm-up for one
            "HALF_LIFE": 0,  # iterations in which the zenith halves where no mean reaches it; 0: it stays
            "KEEP_HISTORY": False,  # True: also where a run is resumed with another batch size
            "OVER_OWN_OPTIMIZER": True,  # the ratio goes over what a project's own build_optimizer makes
            # True: end when ratio and AP have settled over 2 x TEST.PATIENCE evaluations; MAX_ITER is the cap
            "UNTIL_SETTLED": False,
        },
        # Averaged weights, evaluated and saved beside the trained ones (one more copy of the weights).
        "AVERAGE": {
            "KIND": "",  # "ema", "tail", or "" for none
            "DECAY": 0.999,  # of "ema", per iteration
            "TAIL": 0.1,  # of "tail": about the newest share of all iterations so far
        },
        "ADAMW": {"BETAS": (0.9, 0.999), "EPS": 1e-8},
        "PRODIGY": {
            "BETAS": (0.9, 0.999),
            "D_COEF": 1.0,  # multiplies the LR that Prodigy estimates; BASE_LR stays 1
            "SAFEGUARD_WARMUP": True,  # right whenever WARMUP_ITERS > 0
            "USE_BIAS_CORRECTION": True,
        },
    },
    "TEST": {
        "MAX_IMAGES": 0,  # evaluate on the first N images of each set; 0: all
        "VALIDATION_LOSS": False,  # True: each evaluation also computes the training losses on the test set
        # End a run when this has not improved in PATIENCE evaluations: "box AP", "averaged mask AP" …, or
        # "validation loss"; "": never
        "EARLY_STOPPING": "",
        "PATIENCE": 5,
    },
    "CHECKPOINT": {
        "KEEP": 0,  # periodic checkpoints that are kept, the newest; 0: all
        # "box AP", "mask AP", "keypoint AP", or one of these with "averaged " before it: keep the best model
        # by it, as model_best.pth
        "BEST": "",
    },
    "RECOVERY": {
        "MAX_ROLLBACKS": 3,  # times that a diverged run goes back to its last good checkpoint; 0: it stops
        "LR_FACTOR": 0.5,  # what the LR is multiplied by, each time
        "DIVERGENCE_FACTOR": 10.0,  # diverged: a median loss so many times the lowest; 0: only what isn't finite
    },
    "LOGGERS": (),  # of "wandb", "mlflow": where scalars go besides metrics.json and TensorBoard
    "DETERMINISTIC": False,  # True: algorithms that give the same bits each time, on a GPU too (slower)
}


def add_zenith_config(cfg: FvcoreCfgNode) -> None:
    """Add this toolkit's keys, with their defaults, to a configuration that has Detectron2's.

    Args:
        cfg: the result of this package's ``get_cfg()`` or of Detectron2's; changed in place. A key that
            is there already keeps its value, so calling this twice does no harm.

    Raises:
        AttributeError: ``cfg`` is frozen.

    Example::

        cfg = detectron2.config.get_cfg()
        add_zenith_config(cfg)
        cfg.merge_from_file("configs/mask_rcnn_zenith.yaml")
    """
    if cfg.is_frozen():
        raise AttributeError("the configuration is frozen: call add_zenith_config before freeze()")
    _add_missing(cfg, ZENITH_DEFAULTS)
    if not hasattr(cfg, "assign"):
        # Detectron2's nodes merge files and overrides by themselves, and refuse what they don't have. None: not set.
        for old in MOVED_KEYS:
            cfg.SOLVER.ZENITH.setdefault(old.rpartition(".")[2], None)


def _add_missing(node: FvcoreCfgNode, defaults: dict[str, Any]) -> None:
    for key, value in defaults.items():
        if isinstance(value, dict):
            # The node's own class: Detectron2's functions want Detectron2's nodes.
            _add_missing(node.setdefault(key, type(node)()), value)
        else:
            node.setdefault(key, value)
