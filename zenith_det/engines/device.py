"""Where a run takes place."""

from __future__ import annotations

import logging
import os

import torch

from zenith_det.config import LoadedConfig
from zenith_det.errors import ConfigError

logger = logging.getLogger(__name__)


def resolve_device(loaded: LoadedConfig) -> None:
    """Set ``MODEL.DEVICE`` to what is there: for ``auto``, and for Detectron2's default where nobody chose it.

    On the CPU ``SOLVER.AMP.ENABLED`` is turned off, with a warning.

    Raises:
        ConfigError: a device that was asked for is not there, or is neither CPU nor CUDA.
    """
    cfg, there = loaded.cfg, torch.cuda.is_available()
    asked = cfg.MODEL.DEVICE
    if asked == "auto" or (asked == "cuda" and "MODEL.DEVICE" not in loaded.sources):
        cfg.MODEL.DEVICE = "cuda" if there else "cpu"
        if not there:
            logger.info("no CUDA device: MODEL.DEVICE cpu")
    elif asked.split(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"MODEL.DEVICE is {asked!r}: it must be auto, cpu or cuda")
    elif asked.startswith("cuda") and not there:
        source = loaded.sources.get("MODEL.DEVICE", "default")
        raise ConfigError(
            f"MODEL.DEVICE is {asked!r} ({source}), but PyTorch sees no CUDA device: use auto or cpu"
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        logger.warning("SOLVER.AMP.ENABLED has no effect on the CPU: training in float32")
        cfg.SOLVER.AMP.ENABLED = False


def use_deterministic_algorithms(wanted: bool) -> None:
    """``DETERMINISTIC``: the same bits from the same input, on a GPU too, where that costs speed.

    Raises, later on, ``RuntimeError`` from torch at an operation that has no such algorithm.
    """
    if wanted:
        # cuBLAS reads it when it is first used (docs.nvidia.com/cuda/cublas, "Results Reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)
