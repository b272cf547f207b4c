"""This toolkit's configuration as Detectron2's own."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode as Detectron2CfgNode
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer

from zenith_det.config import CfgNode, LoadedConfig, add_zenith_config
from zenith_det.config.keys import leaves

logger = logging.getLogger(__name__)


def to_detectron2(source: LoadedConfig | CfgNode | Detectron2CfgNode) -> Detectron2CfgNode:
    """The configuration as Detectron2's own, frozen; one that is Detectron2's already, as it is."""
    ours = source.cfg if isinstance(source, LoadedConfig) else source
    if isinstance(ours, Detectron2CfgNode):
        return ours
    cfg = get_cfg()
    add_zenith_config(cfg)
    for key, value in leaves(ours):
        *sections, name = key.split(".")
        node = cfg
        for section in sections:
            node = node[section]
        node[name] = value
    cfg.freeze()
    return cfg


def auto_scale_workers(cfg: Any, num_workers: int) -> Any:
    """Detectron2's scaling for another number of processes, with this toolkit's keys.

    ``SOLVER.ZENITH.WINDOW``, ``RECORD_AFTER`` and ``HALF_LIFE`` count iterations, like ``WARMUP_ITERS``
    and ``STEPS``, and are divided by the same factor: they span the same number of images as before. The
    window and a half-life stay at least 1. ``MAX_NONFINITE_STEPS`` counts failures and stays.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
    if scaled is cfg:
        return cfg
    frozen = scaled.is_frozen()
    scaled.defrost()
    zenith = scaled.SOLVER.ZENITH
    factor = num_workers / reference
    zenith.WINDOW = max(1, round(zenith.WINDOW / factor))
    zenith.RECORD_AFTER = round(zenith.RECORD_AFTER / factor)
    if zenith.HALF_LIFE:
        zenith.HALF_LIFE = max(1, round(zenith.HALF_LIFE / factor))
    logger.info(
        "Auto-scaling SOLVER.ZENITH to WINDOW %d, RECORD_AFTER %d, HALF_LIFE %d",
        zenith.WINDOW, zenith.RECORD_AFTER, zenith.HALF_LIFE,
    )  # fmt: skip
    if frozen:
        scaled.freeze()
    return scaled
