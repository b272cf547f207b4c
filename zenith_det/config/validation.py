"""Values that no training can run with, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from zenith_det.config.defaults import ZENITH_DEFAULTS
from zenith_det.config.keys import did_you_mean, leaves
from zenith_det.config.metric_names import APS, AVERAGED, VALIDATION_LOSS
from zenith_det.config.node import CfgNode
from zenith_det.config.optimizer_names import ZENITH_OPTIMIZERS
from zenith_det.errors import ConfigError, quote

SUPPORTED_VERSION = 2

_Check = Callable[[Any], bool]


def _number(check: Callable[[float], bool]) -> _Check:
    return lambda value: isinstance(value, (int, float)) and math.isfinite(value) and check(value)


_POSITIVE = (_number(lambda x: x > 0), "a number above 0")
_NOT_NEGATIVE = (_number(lambda x: x >= 0), "a number from 0 up")
_FROM_1 = (_number(lambda x: x >= 1), "1 or more")
_UNIT_OPEN = (_number(lambda x: 0 <= x < 1), "in [0, 1)")
_UNIT = (_number(lambda x: 0 <= x <= 1), "in [0, 1]")
_BETAS = (
    lambda pair: isinstance(pair, tuple) and len(pair) == 2 and all(_UNIT_OPEN[0](x) for x in pair),
    "two numbers in [0, 1)",
)

_EXPECTED = (
    lambda rows: all(
        isinstance(row, (list, tuple))
        and [isinstance(item, str) for item in row] == [True, True, False, False]
        and all(_NOT_NEGATIVE[0](number) for number in row[2:])
        for row in rows
    ),
    "a list of [task, metric, value, tolerance], such as [['bbox', 'AP', 38.5, 0.2]]",
)

_LOGGERS = ("wandb", "mlflow")

_RANGES: dict[str, tuple[_Check, str]] = {
    "SOLVER.MAX_ITER": _FROM_1,
    "SOLVER.IMS_PER_BATCH": _FROM_1,
    "SOLVER.GRADIENT_ACCUMULATION": _FROM_1,
    "SOLVER.CHECKPOINT_PERIOD": _FROM_1,
    "SOLVER.REFERENCE_WORLD_SIZE": _NOT_NEGATIVE,
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": _UNIT_OPEN,
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": (lambda x: x is None or _NOT_NEGATIVE[0](x), "None or a number from 0 up"),
    "SOLVER.BIAS_LR_FACTOR": _POSITIVE,
    "SOLVER.GAMMA": _POSITIVE,
    "SOLVER.NUM_DECAYS": _FROM_1,
    "SOLVER.PLATEAU_PATIENCE": _NOT_NEGATIVE,
    "SOLVER.WARMUP_ITERS": _NOT_NEGATIVE,
    "SOLVER.WARMUP_FACTOR": _NOT_NEGATIVE,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (
        lambda p: isinstance(p, float) and p > 0,
        "a number above 0, or .inf",
    ),
    "SOLVER.ZENITH.WINDOW": _FROM_1,
    "SOLVER.ZENITH.MIN_RATIO": _UNIT,
    "SOLVER.ZENITH.RECORD_AFTER": _NOT_NEGATIVE,
    "SOLVER.ZENITH.HALF_LIFE": _NOT_NEGATIVE,
    "SOLVER.MAX_NONFINITE_STEPS": _FROM_1,
    "SOLVER.AVERAGE.DECAY": _UNIT_OPEN,
    "SOLVER.AVERAGE.TAIL": (_number(lambda x: 0 < x <= 1), "in (0, 1]"),
    "SOLVER.ADAMW.BETAS": _BETAS,
    "SOLVER.ADAMW.EPS": _POSITIVE,
    "SOLVER.PRODIGY.BETAS": _BETAS,
    "SOLVER.PRODIGY.D_COEF": _POSITIVE,
    "INPUT.CROP.SIZE": (
        lambda size: (
            isinstance(size, (list, tuple)) and len(size) == 2 and all(_POSITIVE[0](x) for x in size)
        ),
        "two numbers above 0",
    ),
    "DATASETS.VAL_SHARE": _UNIT_OPEN,
    "INPUT.VALUE_RANGE": (
        lambda r: (
            isinstance(r, list | tuple)
            and (not r or (len(r) == 2 and all(_number(lambda x: True)(x) for x in r) and r[0] < r[1]))
        ),
        "two numbers, the smaller first, or ()",
    ),
    "DATALOADER.NUM_WORKERS": _NOT_NEGATIVE,
    "TEST.EXPECTED_RESULTS": _EXPECTED,
    "TEST.EVAL_PERIOD": _NOT_NEGATIVE,
    "TEST.MAX_IMAGES": _NOT_NEGATIVE,
    "TEST.DETECTIONS_PER_IMAGE": _FROM_1,
    "TEST.PATIENCE": _FROM_1,
    "CHECKPOINT.KEEP": _NOT_NEGATIVE,
    "RECOVERY.MAX_ROLLBACKS": _NOT_NEGATIVE,
    "RECOVERY.LR_FACTOR": (_number(lambda x: 0 < x < 1), "in (0, 1)"),
    "RECOVERY.DIVERGENCE_FACTOR": (_number(lambda x: x == 0 or x > 1), "0, or a number above 1"),
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.AMP.DTYPE": ("float16", "bfloat16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "SOLVER.ZENITH.NORM_SOURCE": ("gradient", "momentum"),
    "DATASETS.CROWDS": ("auto", "regions", "objects"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    "SOLVER.AVERAGE.KIND": ("", "ema", "tail"),
    "CHECKPOINT.BEST": ("", *APS),
    "TEST.EARLY_STOPPING": ("", *APS, VALIDATION_LOSS),
}


def validate_added_keys(cfg: Any) -> None:
    """Refuse a value of the keys that this toolkit adds; Detectron2's own are a project's to interpret.

    Args:
        cfg: Detectron2's configuration after :func:`~zenith_det.config.add_zenith_config`.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    _check_values(cfg, {}, {key for key, _ in leaves(ZENITH_DEFAULTS)})
    _check_evaluations(cfg, {})


def validate_config(cfg: CfgNode, sources: Mapping[str, str] | None = None) -> None:
    """Refuse a value that no engine could use; names of optimizers and schedules are left to the registries.

    Args:
        cfg: a full configuration, with :func:`~zenith_det.config.add_zenith_config`'s keys.
        sources: where each key was set, for the message.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    sources = sources or {}
    if cfg.VERSION != SUPPORTED_VERSION:
        raise _wrong("VERSION", cfg.VERSION, f"only version {SUPPORTED_VERSION} is supported", sources)
    _check_values(cfg, sources, _RANGES.keys() | _CHOICES.keys())
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and not _is_interval(sizes):
        problem = "INPUT.MIN_SIZE_TRAIN_SAMPLING 'range' takes two sizes, the smaller one first"
        raise _wrong("INPUT.MIN_SIZE_TRAIN", sizes, problem, sources)
    crop = cfg.INPUT.CROP
    if crop.ENABLED and crop.TYPE.startswith("relative") and max(crop.SIZE) > 1:
        raise _wrong(
            "INPUT.CROP.SIZE", crop.SIZE, f"INPUT.CROP.TYPE {crop.TYPE!r} takes parts, up to 1", sources
        )
    if crop.ENABLED and crop.TYPE == "absolute_range" and not _is_interval(crop.SIZE):
        problem = "INPUT.CROP.TYPE 'absolute_range' takes two whole numbers of pixels, the smaller one first"
        raise _wrong("INPUT.CROP.SIZE", crop.SIZE, problem, sources)
    if cfg.TEST.AUG.ENABLED:
        sizes, longest = cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE
        if not sizes or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise _wrong("TEST.AUG.MIN_SIZES", sizes, "it must be a list of whole numbers of pixels", sources)
        if not _FROM_1[0](longest):
            raise _wrong("TEST.AUG.MAX_SIZE", longest, f"it must be {_FROM_1[1]}", sources)
    for key in ("CHECKPOINT.BEST", "TEST.EARLY_STOPPING"):
        _check_metric(cfg, key, sources)
    _check_evaluations(cfg, sources)
    if cfg.SOLVER.ZENITH.UNTIL_SETTLED and cfg.SOLVER.OPTIMIZER not in ZENITH_OPTIMIZERS:
        problem = f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER} has no ratio to settle"
        raise _wrong("SOLVER.ZENITH.UNTIL_SETTLED", True, problem, sources)


def _check_values(cfg: Any, sources: Mapping[str, str], keys: Collection[str]) -> None:
    """Refuse values of these keys that are out of their range, or not among their choices."""
    for key, (allowed, text) in _RANGES.items():
        if key in keys and not allowed(value := _get(cfg, key)):
            raise _wrong(key, value, f"it must be {text}", sources)
    for key, choices in _CHOICES.items():
        if key in keys and (value := _get(cfg, key)) not in choices:
            names = ", ".join(repr(choice) for choice in choices)
            raise _wrong(key, value, f"it must be one of {names}{did_you_mean(str(value), choices)}", sources)
    for name in cfg.LOGGERS:
        if name not in _LOGGERS:
            raise _wrong("LOGGERS", cfg.LOGGERS, f"it may hold {' and '.join(map(repr, _LOGGERS))}", sources)


def _check_evaluations(cfg: Any, sources: Mapping[str, str]) -> None:
    """Refuse to judge by evaluations of which there are none."""
    for key in ("TEST.EARLY_STOPPING", "SOLVER.ZENITH.UNTIL_SETTLED"):
        if _get(cfg, key) and not cfg.TEST.EVAL_PERIOD:
            raise _wrong(key, _get(cfg, key), "it is judged by evaluations: set TEST.EVAL_PERIOD", sources)
    if cfg.TEST.EARLY_STOPPING == VALIDATION_LOSS and not cfg.TEST.VALIDATION_LOSS:
        raise _wrong("TEST.EARLY_STOPPING", VALIDATION_LOSS, "set TEST.VALIDATION_LOSS True", sources)
    for key in ("CHECKPOINT.BEST", "TEST.EARLY_STOPPING"):
        metric = _get(cfg, key)
        if metric.startswith(AVERAGED) and not cfg.SOLVER.AVERAGE.KIND:
            raise _wrong(key, metric, "no weights are averaged, SOLVER.AVERAGE.KIND is ''", sources)


def _is_interval(sizes: Any) -> bool:
    return (
        isinstance(sizes, (list, tuple))
        and len(sizes) == 2
        and all(isinstance(size, int) for size in sizes)
        and sizes[0] <= sizes[1]
    )


def _check_metric(cfg: CfgNode, key: str, sources: Mapping[str, str]) -> None:
    """Refuse an AP that no evaluation of this configuration gives."""
    metric = _get(cfg, key)
    for name, switch in (("mask AP", "MASK_ON"), ("keypoint AP", "KEYPOINT_ON")):
        if metric.endswith(name) and not cfg.MODEL[switch]:
            raise _wrong(key, metric, f"the model has none, MODEL.{switch} is False", sources)


def _get(cfg: CfgNode, key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return value


def _wrong(key: str, value: Any, problem: str, sources: Mapping[str, str]) -> ConfigError:
    source = f"{sources[key]}: " if key in sources else ""
    return ConfigError(f"{source}{key} is {quote(value)}: {problem}")
