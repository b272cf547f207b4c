"""From a configuration to an optimizer and an LR schedule, each looked up by name in a registry."""

from zenith_det.solver.clipping import add_gradient_clipping
from zenith_det.solver.decay import tell_of_decay
from zenith_det.solver.lr_schedules import MultiplierLR, PlateauLR, build_lr_scheduler
from zenith_det.solver.optimizers import build_optimizer, effective_lrs, eval_mode, train_mode
from zenith_det.solver.param_groups import get_param_groups
from zenith_det.solver.registry import LR_SCHEDULER_REGISTRY, OPTIMIZER_REGISTRY

__all__ = [
    "LR_SCHEDULER_REGISTRY",
    "OPTIMIZER_REGISTRY",
    "MultiplierLR",
    "PlateauLR",
    "add_gradient_clipping",
    "build_lr_scheduler",
    "build_optimizer",
    "effective_lrs",
    "eval_mode",
    "get_param_groups",
    "tell_of_decay",
    "train_mode",
]
