"""The Detectron2 engine: a plug-in for projects that use Detectron2, and ``tools/train_net.py``'s runs on it.

Names are imported when they are asked for: this package can be looked at where Detectron2 is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zenith_det.engines.selection import probe_detectron2

if TYPE_CHECKING:
    from zenith_det.engines.detectron2_engine.checkpoint import SafeCheckpointer
    from zenith_det.engines.detectron2_engine.data import register_checked_dataset
    from zenith_det.engines.detectron2_engine.evaluation import CocoEvaluator, build_evaluator
    from zenith_det.engines.detectron2_engine.hooks import ZenithMetrics
    from zenith_det.engines.detectron2_engine.mixin import ZenithTrainerMixin
    from zenith_det.engines.detectron2_engine.trainer import ZenithTrainer
    from zenith_det.engines.detectron2_engine.zoo import load_config_file, put_zenith_under

__all__ = [
    "CocoEvaluator",
    "SafeCheckpointer",
    "ZenithMetrics",
    "ZenithTrainer",
    "ZenithTrainerMixin",
    "build_evaluator",
    "load_config_file",
    "put_zenith_under",
    "register_checked_dataset",
]

_MODULES = {
    "CocoEvaluator": "evaluation",
    "SafeCheckpointer": "checkpoint",
    "ZenithMetrics": "hooks",
    "ZenithTrainer": "trainer",
    "ZenithTrainerMixin": "mixin",
    "build_evaluator": "evaluation",
    "load_config_file": "zoo",
    "put_zenith_under": "zoo",
    "register_checked_dataset": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    # One that was built for another torch raises anything from OSError to RuntimeError.
    except Exception:
        detectron2 = probe_detectron2()
        if detectron2.usable:
            raise
        raise ImportError(f"{name} needs Detectron2, and {detectron2.problem}") from None
    return getattr(module, name)
