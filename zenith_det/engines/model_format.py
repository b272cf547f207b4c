"""``MODEL.CHANNELS_LAST`` and ``MODEL.COMPILE_BACKBONE``: how a model computes, not what."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes

from zenith_det.errors import ConfigError, one_line

logger = logging.getLogger(__name__)

#: Of ``torch.compile``.
BACKEND = "inductor"


def use_channels_last(cfg: Any, model: nn.Module) -> None:
    """Under ``MODEL.CHANNELS_LAST``: weights of convolutions and batches of images with the channels innermost.

    The values stay the same, and so do checkpoints. Layers in between keep the order that they get.

    Args:
        cfg: any configuration with this toolkit's keys.
        model: changed in place, also its parameters' memory: before an optimizer is made. Of whatever
            architecture, with its convolutions behind a ``backbone`` that takes the batch ``(N, 3, H, W)``.

    Raises:
        ConfigError: it has no backbone.
    """
    if not cfg.MODEL.CHANNELS_LAST:
        return
    backbone = _backbone(cfg, model, "MODEL.CHANNELS_LAST")
    if _channels_innermost in backbone._forward_pre_hooks.values():
        return  # it does already
    backbone.register_forward_pre_hook(_channels_innermost)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _channels_innermost(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x
        for x in inputs
    )


def compile_backbone(cfg: Any, model: nn.Module) -> None:
    """Under ``MODEL.COMPILE_BACKBONE``: let ``torch.compile`` fuse the backbone's small operations.

    In place, so that the names of weights stay. For images of any size at once: with fixed sizes each new
    size of a batch would compile anew, and kernels would depend on which size came first.

    Args:
        cfg: any configuration with this toolkit's keys; its ``MODEL.DEVICE`` is resolved.
        model: with a ``backbone``, not wrapped by DDP.

    Raises:
        ConfigError: it has no backbone, or nothing can be compiled on this machine.
    """
    if not cfg.MODEL.COMPILE_BACKBONE:
        return
    backbone = _backbone(cfg, model, "MODEL.COMPILE_BACKBONE")
    _check_compiler(torch.device(cfg.MODEL.DEVICE))
    logger.info(
        "the backbone is compiled in the first iteration and the first evaluation, which takes minutes"
    )
    # A first batch as high as wide would otherwise give kernels for squares alone.
    shapes.use_duck_shape = False
    backbone.compile(dynamic=True, backend=BACKEND)


def _check_compiler(device: torch.device) -> None:
    # Compiling anything is the only test that holds for all devices; not from the cache, which needs no compiler.
    from torch._inductor import config

    try:
        with config.patch(force_disable_caches=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one says that there is no cache
            torch.compile(_anything, backend=BACKEND)(torch.ones(4, device=device))
    except Exception as error:
        reason = one_line(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise ConfigError(
            f"MODEL.COMPILE_BACKBONE is True, but torch.compile does not work here ({reason}): set it to False"
        ) from error


def _anything(x: Tensor) -> Tensor:
    return x * 2 + 1


def _backbone(cfg: Any, model: nn.Module, key: str) -> nn.Module:
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ConfigError(
            f"{key} is True, but {type(model).__name__} (MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}) "
            "has no backbone: set it to False"
        )
    return backbone
