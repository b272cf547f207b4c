"""Which runs a comparison consists of."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zenith_det.comparing.arms import Arm
from zenith_det.config import LoadedConfig
from zenith_det.config.optimizer_names import SGD_OPTIMIZERS
from zenith_det.errors import ConfigError

#: Where a run of the comparison is and how, not what it trains: another value is the same run.
_PLACE = {"OUTPUT_DIR", "MODEL.DEVICE"}
#: Optimizers that one LR and one weight decay suit.
_OF_SGD = (*SGD_OPTIMIZERS, "ScheduleFreeSGD")
#: What the comparison itself sets, and the flag that says what.
_OURS = {"SEED": "--seeds", "OUTPUT_DIR": "--output"}

LoadConfig = Callable[[str, Sequence[str]], LoadedConfig]


@dataclass(frozen=True)
class Run:
    """One training run of a comparison.

    Attributes:
        arm: what it trains with.
        lr: its SOLVER.BASE_LR.
        seed: its SEED.
        folder: its OUTPUT_DIR.
        keys: all overrides of the config file, KEY to VALUE as text, but OUTPUT_DIR.
        fingerprint: of everything set in the config and on the command line.
        max_iter: its length, in iterations.
        optimizer: SOLVER.OPTIMIZER, the config's where the arm leaves it.
    """

    arm: Arm
    lr: float
    seed: int
    folder: Path
    keys: Mapping[str, str]
    fingerprint: str
    max_iter: int
    optimizer: str

    @property
    def title(self) -> str:
        """For a line about it."""
        return f"{self.arm.name} lr {self.arm.lr_text(self.lr)} seed {self.seed}"


def plan_runs(
    load: LoadConfig,
    config_file: str,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    output: Path,
    *,
    opts: Sequence[str] = (),
    engine: str = "auto",
    lrs: Mapping[str, Sequence[float]] | None = None,
    lr_scales: Sequence[float] = (1.0,),
    evaluations: int = 8,
) -> list[Run]:
    """All runs, seeds outermost: a comparison that is not finished yet has all arms alike.

    An arm and its averaged self share theirs, see :func:`distinct`.

    Args:
        load: reads the config file with overrides.
        opts: KEY VALUE overrides for all runs.
        lrs: by arm name, its learning rates; others have their own times each of ``lr_scales``.
        evaluations: of each run, evenly spaced, unless ``opts`` has TEST.EVAL_PERIOD.

    Raises:
        ConfigError: a key, a value or an arm that cannot be used.
    """
    shared = dict(zip(opts[::2], opts[1::2], strict=False))
    base = load(config_file, list(opts))
    for key, flag in _OURS.items():
        if key in shared:
            raise ConfigError(f"{key} {shared[key]}: a comparison sets it itself: use {flag}")
    for arm in arms:
        for key in {*arm.keys(1), "SOLVER.BASE_LR"} & shared.keys() - {"SOLVER.BASE_LR"}:
            raise ConfigError(
                f"{key} {shared[key]}: arm {arm.name} sets it itself: make an arm of it in an --arms-file"
            )
    for arm in arms:
        if arm.finds_lr and arm.name in (lrs or {}):
            raise ConfigError(f"--lrs {arm.name}=…: its learning rate comes from a range test")
    unknown = set(lrs or {}) - {arm.name for arm in arms}
    if unknown:
        raise ConfigError(f"--lrs {sorted(unknown)[0]}=…: no such arm among --arms")
    if base.cfg.SOLVER.OPTIMIZER not in _OF_SGD:
        for arm in arms:
            if arm.lr is None and arm.overrides.get("SOLVER.OPTIMIZER") in _OF_SGD:
                raise ConfigError(
                    f"{config_file}: SOLVER.OPTIMIZER is {base.cfg.SOLVER.OPTIMIZER}, and arm {arm.name} takes "
                    "SOLVER.BASE_LR and WEIGHT_DECAY from the config: compare from one of SGD or ZENITH"
                )
    trained_as = {arm.name: _trained_as(arm, arms) for arm in arms}
    max_iter = int(base.cfg.SOLVER.MAX_ITER)
    period = {}
    if "TEST.EVAL_PERIOD" not in shared:
        period = {"TEST.EVAL_PERIOD": str(max(1, round(max_iter / evaluations)))}
    runs = []
    for seed in seeds:
        for arm in arms:
            own = arm.base_lr(float(base.cfg.SOLVER.BASE_LR))
            for lr in [own] if arm.finds_lr else (lrs or {}).get(arm.name) or [own * s for s in lr_scales]:
                trained = trained_as[arm.name]
                keys = shared | period | {key: str(value) for key, value in trained.keys(max_iter).items()}
                keys |= {"SOLVER.BASE_LR": f"{lr:.6g}", "SEED": str(seed)}
                loaded = load(config_file, [word for pair in keys.items() for word in pair])
                folder = output / "runs" / trained.name / f"lr{lr:.6g}" / f"seed{seed}"
                runs.append(
                    Run(
                        arm,
                        float(f"{lr:.6g}"),
                        seed,
                        folder,
                        keys,
                        _fingerprint(loaded, engine),
                        max_iter,
                        loaded.cfg.SOLVER.OPTIMIZER,
                    )
                )
    return runs


def _trained_as(arm: Arm, arms: Sequence[Arm]) -> Arm:
    """The arm whose runs give this one's figures too: averaging changes nothing about the weights it averages.

    An arm without averaging that is compared with its averaged self isn't trained twice.
    """
    if arm.averaged:
        return arm
    own = _without_average(replace(arm, averaged=True))
    return next((other for other in arms if other.averaged and _without_average(other) == own), arm)


def _without_average(arm: Arm) -> Arm:
    kept = {key: value for key, value in arm.overrides.items() if not key.startswith("SOLVER.AVERAGE.")}
    return replace(arm, name="", label="", overrides=kept)


def distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs to carry out: each folder once."""
    return list({run.folder: run for run in runs}.values())


def _fingerprint(loaded: LoadedConfig, engine: str) -> str:
    """A fingerprint of what was set. Defaults stay out: a new key in a later version changes no run."""
    values = {
        key: repr(functools.reduce(getattr, key.split("."), loaded.cfg))
        for key in loaded.sources
        if key not in _PLACE
    }
    text = json.dumps([engine, values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
