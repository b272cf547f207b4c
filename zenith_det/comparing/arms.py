"""The arms of a comparison: an optimizer and a schedule each, as a few config keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zenith_det.errors import ConfigError, one_line, quote

#: Where the usual step schedule ("1x": 60k and 80k of 90k) lowers the LR.
STEPS_AT = (2 / 3, 8 / 9)

#: AdamW's η₀ where none is given: five times that of the recipe for pre-trained weights at batch 16, as these arms
#: are first meant for small models from scratch.
ADAMW_LR = 0.0005

_FIELDS = ("label", "overrides", "lr", "lr_factor", "steps_at", "averaged")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: for the command line and folders.
        label: for people.
        overrides: config keys and their values.
        lr: SOLVER.BASE_LR, for optimizers whose LR has another meaning than SGD's.
        lr_factor: otherwise, what the config's own SOLVER.BASE_LR is multiplied by.
        steps_at: parts of SOLVER.MAX_ITER that become SOLVER.STEPS.
        averaged: the AP of the averaged weights counts (``averaged/bbox/AP`` in metrics.json).
    """

    name: str
    label: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    lr_factor: float = 1.0
    steps_at: tuple[float, ...] = ()
    averaged: bool = False

    def base_lr(self, config_lr: float) -> float:
        """Its own η₀ under a config with this SOLVER.BASE_LR."""
        return self.lr if self.lr is not None else config_lr * self.lr_factor

    @property
    def finds_lr(self) -> bool:
        """Whether a range test before the run chooses η₀, whatever is asked for."""
        return bool(self.overrides.get("SOLVER.AUTO_LR"))

    def lr_text(self, lr: float) -> str:
        """``lr``, its η₀, for a table."""
        return "auto" if self.finds_lr else f"{lr:g}"

    def keys(self, max_iter: int) -> dict[str, Any]:
        """Its config keys, the learning rate left out, for a run of this length."""
        steps = {}
        if self.steps_at:
            # At least 1 and all different, in the shortest run too.
            at = sorted({max(1, round(max_iter * part)) for part in self.steps_at})
            steps = {"SOLVER.STEPS": tuple(at)}
        return {**self.overrides, **steps}


def _solver(optimizer: str, schedule: str, **more: Any) -> dict[str, Any]:
    keys = {"SOLVER.OPTIMIZER": optimizer, "SOLVER.LR_SCHEDULER_NAME": schedule}
    keys["SOLVER.AVERAGE.KIND"] = ""  # whatever the config does
    return keys | {"SOLVER." + key.replace("__", "."): value for key, value in more.items()}


_ZENITH = _solver("ZENITH", "WarmupZenithLR")
_ADAMW = {"SOLVER.WEIGHT_DECAY": 0.05}
_ZENITH_ADAMW = _solver("ZENITHAdamW", "WarmupZenithLR") | _ADAMW
_STEP = _solver("SGD", "WarmupMultiStepLR", GAMMA=0.1)
_COSINE = _solver("SGD", "WarmupCosineLR")
_PLATEAU = _solver("SGD", "WarmupPlateauLR", GAMMA=0.1, PLATEAU_PATIENCE=1)
_CONSTANT = _solver("SGD", "WarmupConstantLR")
_EMA = {"SOLVER.AVERAGE.KIND": "ema"}
_TAIL = {"SOLVER.AVERAGE.KIND": "tail"}

# Learning rates: configs/baselines/ says where they come from.
BUILT_IN: tuple[Arm, ...] = (
    Arm("zenith", "ZENITH", _ZENITH),
    Arm("zenith_average", "ZENITH averaged", _ZENITH | _EMA, averaged=True),
    Arm("zenith_tail_average", "ZENITH tail-averaged", _ZENITH | _TAIL, averaged=True),
    Arm(
        "zenith_auto_lr",
        "ZENITH tail-averaged, η₀ by range test",
        _ZENITH | _TAIL | {"SOLVER.AUTO_LR": True},
        averaged=True,
    ),
    Arm("zenith_momentum", "ZENITH momentum norm", _ZENITH | {"SOLVER.ZENITH.NORM_SOURCE": "momentum"}),
    Arm("zenith_window_25", "ZENITH W = 25", _ZENITH | {"SOLVER.ZENITH.WINDOW": 25}),
    Arm("sgd_step", "SGD step", _STEP, steps_at=STEPS_AT),
    Arm("sgd_step_average", "SGD step averaged", _STEP | _EMA, steps_at=STEPS_AT, averaged=True),
    Arm("sgd_step_tail_average", "SGD step tail-averaged", _STEP | _TAIL, steps_at=STEPS_AT, averaged=True),
    Arm("sgd_cosine", "SGD cosine", _COSINE),
    Arm("sgd_cosine_average", "SGD cosine averaged", _COSINE | _EMA, averaged=True),
    Arm("sgd_cosine_tail_average", "SGD cosine tail-averaged", _COSINE | _TAIL, averaged=True),
    Arm("sgd_plateau", "SGD reduced on plateau", _PLATEAU),
    Arm("sgd_constant", "SGD constant", _CONSTANT),
    Arm("sgd_constant_average", "SGD constant averaged", _CONSTANT | _EMA, averaged=True),
    Arm("sgd_constant_tail_average", "SGD constant tail-averaged", _CONSTANT | _TAIL, averaged=True),
    Arm("zenith_adamw", "ZENITH AdamW tail-averaged", _ZENITH_ADAMW | _TAIL, lr=ADAMW_LR, averaged=True),
    Arm(
        "zenith_adamw_auto_lr",
        "ZENITH AdamW tail-averaged, η₀ by range test",
        _ZENITH_ADAMW | _TAIL | {"SOLVER.AUTO_LR": True},
        lr=ADAMW_LR,
        averaged=True,
    ),
    Arm("adamw_cosine", "AdamW cosine", _solver("AdamW", "WarmupCosineLR") | _ADAMW, lr=ADAMW_LR),
    Arm(
        "adamw_constant_tail_average",
        "AdamW constant tail-averaged",
        _solver("AdamW", "WarmupConstantLR") | _ADAMW | _TAIL,
        lr=ADAMW_LR,
        averaged=True,
    ),
    Arm("schedule_free", "Schedule-Free SGD", _solver("ScheduleFreeSGD", "WarmupConstantLR"), lr_factor=10.0),
    Arm("prodigy", "Prodigy cosine", _solver("Prodigy", "WarmupCosineLR", WEIGHT_DECAY=0.01), lr=1.0),
    Arm("dadapt_sgd", "D-Adapted SGD cosine", _solver("DAdaptSGD", "WarmupCosineLR"), lr=1.0),
)


def read_arms(path: str | Path) -> list[Arm]:
    """Arms from a YAML file: a mapping from names to ``label``, ``overrides``, ``lr`` or ``lr_factor``,
    ``steps_at`` and ``averaged``, all optional; see :class:`Arm`.

    Raises:
        ConfigError: the file cannot be read, or holds something else; the line names the arm and the field.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {one_line(str(error))}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: names of arms are expected, each with its settings")
    return [_arm(path, name, settings) for name, settings in content.items()]


def _arm(path: str | Path, name: Any, settings: Any) -> Arm:
    where = f"{path}: arm {quote(name)}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name has letters, digits and _ . -, and starts with a letter or digit")
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: {', '.join(_FIELDS)} are expected, got {quote(settings)}")
    for given in settings:
        if given not in _FIELDS:
            raise ConfigError(f"{where}: {quote(given)} is unknown: {', '.join(_FIELDS)}")
    overrides = settings.get("overrides") or {}
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise ConfigError(f"{where}: overrides is {quote(overrides)}: config keys with values are expected")
    for number in ("lr", "lr_factor"):
        value = settings.get(number, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ConfigError(f"{where}: {number} is {quote(value)}: a number above 0 is expected")
    if "lr" in settings and "lr_factor" in settings:
        raise ConfigError(f"{where}: lr and lr_factor exclude one another")
    steps = settings.get("steps_at") or []
    if not isinstance(steps, list) or not all(type(s) is float and 0 < s < 1 for s in steps):
        raise ConfigError(
            f"{where}: steps_at is {quote(steps)}: a list of numbers between 0 and 1 is expected"
        )
    averaged = settings.get("averaged", False)
    if not isinstance(averaged, bool):
        raise ConfigError(f"{where}: averaged is {quote(averaged)}: true or false is expected")
    lr = settings.get("lr")
    return Arm(
        name,
        one_line(str(settings.get("label") or name)),
        {key: tuple(v) if isinstance(v, list) else v for key, v in overrides.items()},
        None if lr is None else float(lr),
        float(settings.get("lr_factor", 1.0)),
        tuple(steps),
        averaged,
    )


def choose_arms(names: Sequence[str], arms_file: str | Path | None = None) -> list[Arm]:
    """The arms with these names, a user's own first.

    Raises:
        ConfigError: an unknown name, one given twice, or see :func:`read_arms`.
    """
    known = {arm.name: arm for arm in BUILT_IN}
    if arms_file is not None:
        known |= {arm.name: arm for arm in read_arms(arms_file)}
    chosen = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"--arms {name}: no such arm: {hint}")
        if known[name] in chosen:
            raise ConfigError(f"--arms {name}: given twice")
        chosen.append(known[name])
    return chosen
