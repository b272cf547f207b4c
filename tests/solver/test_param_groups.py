"""Which parameter trains at which LR and decay: Detectron2's rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from zenith_det.errors import ConfigError
from zenith_det.solver import build_optimizer, get_param_groups

from .helpers import config, make_model

CASES: list[dict[str, Any]] = [
    {},
    {"WEIGHT_DECAY_NORM": 0.0001},
    {"WEIGHT_DECAY_NORM": 0.3, "BIAS_LR_FACTOR": 2.0},
    {"BIAS_LR_FACTOR": 2.0, "WEIGHT_DECAY_BIAS": 0.0},
    {"WEIGHT_DECAY_BIAS": 0.5},
    {"WEIGHT_DECAY_NORM": None},
]


def raw_config(settings: dict[str, Any]) -> Any:
    cfg = config()
    for key, value in settings.items():
        cfg.SOLVER[key] = value
    return cfg


def half_in_stem(name: str) -> float:
    return 0.5 if name.startswith("stem.") else 1.0


def names_by(groups: list[dict[str, Any]], key: str) -> dict[Any, set[str]]:
    found: dict[Any, set[str]] = {}
    for group in groups:
        found.setdefault(group.get(key), set()).update(group["param_names"])
    return found


def test_norms_and_biases_have_their_own_settings() -> None:
    cfg = config(BASE_LR=0.1, WEIGHT_DECAY_NORM=0.25, BIAS_LR_FACTOR=2.0, WEIGHT_DECAY_BIAS=0.5)
    groups = get_param_groups(cfg, make_model())
    lrs, decays = names_by(groups, "lr"), names_by(groups, "weight_decay")
    biases = {
        "stem.0.bias",
        "stem.1.bias",
        "body.1.bias",
        "head.1.bias",
        "head.2.bias",
        "tied.bias",
        "unused.bias",
    }
    assert lrs[0.2] == biases == decays[0.5]
    assert decays[0.25] == {"stem.1.weight", "body.1.weight", "head.1.weight"}
    assert decays[None] == {"scale", "stem.0.weight", "body.0.weight", "head.2.weight", "unused.weight"}
    assert lrs[0.1] == decays[0.25] | decays[None]


def test_names_go_with_their_parameters_into_the_optimizer() -> None:
    model = make_model()
    by_name = dict(model.named_parameters())
    for group in build_optimizer(config(), model).param_groups:
        assert len(group["params"]) == len(group["param_names"])
        assert all(by_name[name] is p for name, p in zip(group["param_names"], group["params"]))


def test_frozen_parameters_are_left_out_and_shared_ones_are_there_once() -> None:
    model = make_model()
    parameters = [p for group in get_param_groups(config(), model) for p in group["params"]]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == {p for p in model.parameters() if p.requires_grad}


def test_layer_wise_factors_and_overrides_leave_the_callers_dict_alone() -> None:
    overrides = {"scale": {"lr": 0.7, "weight_decay": 0.0}}
    kept = copy.deepcopy(overrides)
    cfg = config(BASE_LR=1.0, BIAS_LR_FACTOR=2.0)
    groups = get_param_groups(
        cfg,
        make_model(),
        lr_factor_func=lambda name: 0.5 if name.startswith("stem.") else 1.0,
        overrides=overrides,
    )
    lrs = names_by(groups, "lr")
    assert overrides == kept
    assert lrs[0.7] == {"scale"}
    assert lrs[0.5] == {"stem.0.weight", "stem.1.weight"}
    with pytest.raises(ValueError, match="'bias'"):
        get_param_groups(cfg, make_model(), overrides={"bias": {"lr": 1.0}})


def test_a_model_with_nothing_to_train_is_told() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(config(), nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.detectron2
@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize(
    "factor", [None, lambda name: 0.5 if "stem" in name else 1.0], ids=["", "layer-wise"]
)
def test_groups_equal_detectron2s(settings: dict[str, Any], factor: Any) -> None:
    solver = pytest.importorskip("detectron2.solver.build", reason="Detectron2 is not installed")
    cfg, model = raw_config({"BASE_LR": 0.1, **settings}), make_model()
    theirs = solver.get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=factor,
        overrides={"scale": {"weight_decay": 0.9}},
    )
    ours = get_param_groups(cfg, model, lr_factor_func=factor, overrides={"scale": {"weight_decay": 0.9}})
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert all(a is b for a, b in zip(mine.pop("params"), other.pop("params"), strict=True))
        mine.pop("param_names")
        assert mine == other


@pytest.mark.detectron2
def test_groups_of_detectron2s_mask_rcnn_equal_its_own() -> None:
    detectron2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.solver import build_optimizer as their_build_optimizer

    from zenith_det.config import add_zenith_config

    assert detectron2
    cfg = get_cfg()
    add_zenith_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.MODEL.RESNETS.NORM = "GN"
    model = build_model(cfg)
    ours, theirs = build_optimizer(cfg, model), their_build_optimizer(cfg, model)
    assert type(ours) is type(theirs) is torch.optim.SGD
    assert len(ours.param_groups) == len(theirs.param_groups)
    for mine, other in zip(ours.param_groups, theirs.param_groups):
        assert all(a is b for a, b in zip(mine["params"], other["params"], strict=True))
        settings = {key: value for key, value in mine.items() if key not in ("params", "param_names")}
        assert settings == {key: value for key, value in other.items() if key != "params"}
