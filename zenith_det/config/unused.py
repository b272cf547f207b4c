"""Keys that a user set and that don't count, given the optimizer and the schedule that the config names."""

from __future__ import annotations

from collections.abc import Mapping

from zenith_det.config.defaults import DETECTRON2_DEFAULTS, ZENITH_DEFAULTS
from zenith_det.config.keys import leaves
from zenith_det.config.node import CfgNode

_WARMUP = frozenset({"WARMUP_FACTOR", "WARMUP_ITERS", "WARMUP_METHOD"})

# What each schedule reads of SOLVER.
_SCHEDULE_KEYS: dict[str, frozenset[str]] = {
    "WarmupZenithLR": _WARMUP,
    "WarmupConstantLR": _WARMUP,
    "WarmupPlateauLR": _WARMUP | {"GAMMA", "PLATEAU_PATIENCE"},
    "WarmupMultiStepLR": _WARMUP | {"RESCALE_INTERVAL", "STEPS", "GAMMA"},
    "WarmupCosineLR": _WARMUP | {"RESCALE_INTERVAL", "BASE_LR_END"},
    "WarmupStepWithFixedGammaLR": _WARMUP | {"RESCALE_INTERVAL", "GAMMA", "NUM_DECAYS"},
}

_RATIO = frozenset(
    f"ZENITH.{key}"
    for key in (
        "WINDOW",
        "MIN_RATIO",
        "NORM_SOURCE",
        "RECORD_AFTER",
        "HALF_LIFE",
        "KEEP_HISTORY",
        "UNTIL_SETTLED",
    )
)

# What each optimizer reads of SOLVER beside the LR and the weight decay; a section stands for all its keys.
_OPTIMIZER_KEYS: dict[str, frozenset[str]] = {
    "ZENITH": _RATIO | {"MOMENTUM", "NESTEROV"},
    "ZENITHAdamW": _RATIO | {"ADAMW"},
    "SGD": frozenset({"MOMENTUM", "NESTEROV"}),
    "AdamW": frozenset({"ADAMW"}),
    "ScheduleFreeSGD": frozenset({"MOMENTUM"}),
    "Prodigy": frozenset({"PRODIGY"}),
    "DAdaptSGD": frozenset({"MOMENTUM"}),
}


def zenith_unused_keys(sources: Mapping[str, str], cfg: CfgNode) -> list[tuple[str, str]]:
    """Return the keys that were set and don't count, each with where it was set, sorted.

    A key that was set to its default is not among them: nothing else was asked for, and the config.yaml of a run
    sets every key.

    Args:
        sources: :attr:`LoadedConfig.sources <zenith_det.config.LoadedConfig>`.
        cfg: the configuration they led to. An optimizer or schedule that isn't this toolkit's own may read
            any key, so nothing is said about it.
    """
    idle = _idle(_SCHEDULE_KEYS, cfg.SOLVER.LR_SCHEDULER_NAME) | _idle(_OPTIMIZER_KEYS, cfg.SOLVER.OPTIMIZER)
    if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        idle |= {"CLIP_GRADIENTS.CLIP_TYPE", "CLIP_GRADIENTS.CLIP_VALUE", "CLIP_GRADIENTS.NORM_TYPE"}
    elif cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "value":
        idle |= {"CLIP_GRADIENTS.NORM_TYPE"}
    values = dict(leaves(cfg))
    defaults = dict(leaves(DETECTRON2_DEFAULTS)) | dict(leaves(ZENITH_DEFAULTS))
    return sorted(
        (key, source)
        for key, source in sources.items()
        if _covers(idle, key) and values.get(key) != defaults.get(key)
    )


def _idle(reads: Mapping[str, frozenset[str]], name: str) -> frozenset[str]:
    if name not in reads:
        return frozenset()
    return frozenset().union(*reads.values()) - reads[name]


def _covers(idle: frozenset[str], key: str) -> bool:
    section, _, rest = key.partition(".")
    return section == "SOLVER" and (rest in idle or rest.partition(".")[0] in idle)
