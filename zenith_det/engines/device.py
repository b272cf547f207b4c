"""Where a run takes place."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import torch

from zenith_det.config import LoadedConfig
from zenith_det.errors import ConfigError
from zenith_det.training.processes.distributed import get_world_size

logger = logging.getLogger(__name__)


def resolve_device(loaded: LoadedConfig) -> None:
    """Set ``MODEL.DEVICE`` to what is there: for ``auto``, and for Detectron2's default where nobody chose it.

    ``cuda`` is then the process's own GPU: the one of its rank, else the one that ``cuda:N`` names, else the first.
    On the CPU ``SOLVER.AMP.ENABLED`` in float16 is turned off, with a warning.

    Raises:
        ConfigError: a device that was asked for is not there, or is neither CPU nor CUDA; one GPU for several
            processes; bfloat16 on a GPU that computes none.
    """
    cfg, there = loaded.cfg, torch.cuda.is_available()
    asked = cfg.MODEL.DEVICE
    if asked == "auto" or (asked == "cuda" and "MODEL.DEVICE" not in loaded.sources):
        cfg.MODEL.DEVICE = "cuda" if there else "cpu"
        if not there:
            logger.info("no CUDA device: MODEL.DEVICE cpu")
    elif not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise ConfigError(f"MODEL.DEVICE is {asked!r}: it must be auto, cpu, cuda or cuda:N")
    elif asked.startswith("cuda") and not there:
        source = loaded.sources.get("MODEL.DEVICE", "default")
        raise ConfigError(
            f"MODEL.DEVICE is {asked!r} ({source}), but PyTorch sees no CUDA device: use auto or cpu"
        )
    elif ":" in asked:
        _use_gpu(asked)
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


def _use_gpu(asked: str) -> None:
    """Make ``cuda:N`` the GPU that torch's events, seeds and figures of memory are of, not only its tensors."""
    index, there = int(asked.partition(":")[2]), torch.cuda.device_count()
    if get_world_size() > 1:
        raise ConfigError(
            f"MODEL.DEVICE is {asked!r}, but each of {get_world_size()} processes takes a GPU of its own: use cuda"
        )
    if index >= there:
        raise ConfigError(f"MODEL.DEVICE is {asked!r}, but PyTorch sees {there} of them, from cuda:0 on")
    torch.cuda.set_device(index)


def amp_dtype(cfg: Any) -> torch.dtype:
    """``SOLVER.AMP.DTYPE``; of any configuration with this toolkit's keys."""
    return torch.bfloat16 if cfg.SOLVER.AMP.DTYPE == "bfloat16" else torch.float16


def make_grad_scaler(cfg: Any) -> torch.amp.GradScaler:
    """The loss scaler of a run: at work in float16 on a GPU alone. bfloat16 has float32's range."""
    on_gpu = cfg.MODEL.DEVICE.split(":")[0] == "cuda"
    wanted = cfg.SOLVER.AMP.ENABLED and on_gpu and amp_dtype(cfg) is torch.float16
    return torch.amp.GradScaler("cuda", enabled=wanted)


def apply_torch_settings(cfg: Any) -> None:
    """``CUDNN_BENCHMARK`` and ``FLOAT32_PRECISION``, with Detectron2's meanings, and ``DETERMINISTIC``."""
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    use_deterministic_algorithms(cfg)
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"


def use_deterministic_algorithms(cfg: Any) -> None:
    """``DETERMINISTIC``: the same bits from the same input, on a GPU too, where that costs speed.

    Raises, later on, ``RuntimeError`` from torch at an operation that has no such algorithm.
    """
    wanted: bool = cfg.DETERMINISTIC
    if wanted:
        heads = (cfg.MODEL[name] for name in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"))
        if cfg.MODEL.DEVICE != "cpu" and any(head.POOLER_SAMPLING_RATIO == 0 for head in heads):
            logger.warning(
                "DETERMINISTIC on a GPU with a POOLER_SAMPLING_RATIO of 0: torchvision's deterministic RoIAlign "
                "takes a sample at every point of a feature map then, gigabytes for images of usual size; "
                "a ratio of 2 (in MODEL.ROI_BOX_HEAD, ROI_MASK_HEAD and ROI_KEYPOINT_HEAD) takes far less"
            )
        # cuBLAS reads it when it is first used (docs.nvidia.com/cuda/cublas, "Results Reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)
