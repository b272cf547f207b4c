"""Where a run takes place."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from zenith_det.config import LoadedConfig
from zenith_det.errors import ConfigError

logger = logging.getLogger(__name__)


def resolve_device(loaded: LoadedConfig) -> None:
    """Set ``MODEL.DEVICE`` to what is there: for ``auto``, and for Detectron2's default where nobody chose it.

    On the CPU ``SOLVER.AMP.ENABLED`` in float16 is turned off, with a warning.

    Raises:
        ConfigError: a device that was asked for is not there, or is neither CPU nor CUDA; bfloat16 on a GPU
            that computes none.
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
    amp = cfg.SOLVER.AMP
    if not amp.ENABLED:
        return
    if cfg.MODEL.DEVICE == "cpu" and amp.DTYPE == "float16":
        logger.warning(
            "SOLVER.AMP.ENABLED has no effect on the CPU: training in float32 "
            "(bfloat16 works there: SOLVER.AMP.DTYPE bfloat16)"
        )
        amp.ENABLED = False
    elif cfg.MODEL.DEVICE == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        logger.warning("this CPU has no instructions for bfloat16: training in float32 is faster here")
    elif cfg.MODEL.DEVICE != "cpu" and amp.DTYPE == "bfloat16":
        device = torch.device(cfg.MODEL.DEVICE)
        with torch.cuda.device(device):
            usable = torch.cuda.is_bf16_supported(including_emulation=False)
        if not usable:
            raise ConfigError(
                f"SOLVER.AMP.DTYPE is 'bfloat16', which {torch.cuda.get_device_name(device)} does not compute: "
                "take float16"
            )


def amp_dtype(cfg: Any) -> torch.dtype:
    """``SOLVER.AMP.DTYPE``; of any configuration with this toolkit's keys."""
    return torch.bfloat16 if cfg.SOLVER.AMP.DTYPE == "bfloat16" else torch.float16


def make_grad_scaler(cfg: Any) -> torch.amp.GradScaler:
    """The loss scaler of a run: at work in float16 on a GPU alone. bfloat16 has float32's range."""
    on_gpu = cfg.MODEL.DEVICE.split(":")[0] == "cuda"
    wanted = cfg.SOLVER.AMP.ENABLED and on_gpu and amp_dtype(cfg) is torch.float16
    return torch.amp.GradScaler("cuda", enabled=wanted)


def use_deterministic_algorithms(wanted: bool) -> None:
    """``DETERMINISTIC``: the same bits from the same input, on a GPU too, where that costs speed.

    Raises, later on, ``RuntimeError`` from torch at an operation that has no such algorithm.
    """
    if wanted:
        # cuBLAS reads it when it is first used (docs.nvidia.com/cuda/cublas, "Results Reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)
