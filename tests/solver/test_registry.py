"""Optimizers and schedules are found by name, and a name that isn't there is told in one line."""

from __future__ import annotations

import pytest
import torch

from zenith_det.errors import ConfigError
from zenith_det.solver import (
    OPTIMIZER_REGISTRY,
    build_lr_scheduler,
    build_optimizer,
    get_param_groups,
)

from .helpers import config, make_model


def test_unknown_names_list_what_there_is_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as optimizer_error:
        build_optimizer(config(OPTIMIZER="Zenit"), make_model())
    assert str(optimizer_error.value) == (
        "SOLVER.OPTIMIZER 'Zenit' is not one of AdamW, DAdaptSGD, Prodigy, SGD, ScheduleFreeSGD, ZENITH, ZENITHAdamW"
        ": did you mean ZENITH?"
    )
    optimizer = build_optimizer(config(), make_model())
    with pytest.raises(
        ConfigError, match=r"SOLVER.LR_SCHEDULER_NAME 'ZenithLR' is not one of .*WarmupZenithLR\?"
    ):
        build_lr_scheduler(config(LR_SCHEDULER_NAME="ZenithLR"), optimizer)


def test_a_project_adds_its_own() -> None:
    def TestOnlyRMSprop(cfg: object, model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(get_param_groups(cfg, model), lr=0.1)

    OPTIMIZER_REGISTRY.register(TestOnlyRMSprop)
    try:
        built = build_optimizer(config(OPTIMIZER="TestOnlyRMSprop"), make_model())
        assert type(built) is torch.optim.RMSprop
    finally:
        del OPTIMIZER_REGISTRY._obj_map["TestOnlyRMSprop"]
