"""ZENITH in a LazyConfig file of Detectron2::

    from zenith_det.lazy import lr_multiplier, optimizer

    optimizer.lr = 0.01
    optimizer.window = 50
    lr_multiplier.warmup_iters = 500

``adamw`` is ZENITHAdamW in the same way, and ``zenith_over`` puts ZENITH's ratio over the node of any optimizer::

    from zenith_det.lazy import zenith_over

    optimizer = zenith_over(model_zoo.get_config("common/optim.py").AdamW, window=50)

Each import gives nodes of its own, so that one config file does not change another's. Detectron2's
``tools/lazyconfig_train_net.py`` trains with them as it is; to log the LR that ZENITH used, add
``ZenithMetrics()`` to its hooks, after ``hooks.LRScheduler``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zenith_det.engines.detectron2_engine.lazy_nodes import (
    WarmupThenConstant,
    make_adamw,
    make_lr_multiplier,
    make_optimizer,
    zenith_over,
)

if TYPE_CHECKING:
    adamw: Any
    lr_multiplier: Any
    optimizer: Any

__all__ = ["WarmupThenConstant", "adamw", "lr_multiplier", "optimizer", "zenith_over"]

_NODES = {"optimizer": make_optimizer, "adamw": make_adamw, "lr_multiplier": make_lr_multiplier}


def __getattr__(name: str) -> Any:
    if name not in _NODES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _NODES[name]()
