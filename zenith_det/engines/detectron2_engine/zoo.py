"""Configuration files: one's own by path, those of Detectron2's model zoo by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from zenith_det.config import LoadedConfig, load_config, validate_config
from zenith_det.config.keys import leaves
from zenith_det.config.node import COMMAND_LINE, pairs
from zenith_det.engines.selection import probe_model_zoo
from zenith_det.errors import ConfigError

#: What a step schedule needs and ZENITH does not.
SCHEDULE_KEYS = ("SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.NUM_DECAYS", "SOLVER.BASE_LR_END")


def resolve_config_file(name: str) -> str:
    """The path of a config file given by path, or by its name in Detectron2's model zoo.

    Args:
        name: ``configs/mine.yaml``, or ``COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml``. A file that
            exists under this path wins.

    Raises:
        ConfigError: neither exists, or ``detectron2.model_zoo`` cannot be imported.
    """
    if os.path.isfile(name):
        return name
    folder = _zoo_folder(name)
    path = os.path.join(folder, name)
    if os.path.isfile(path):
        return path
    raise ConfigError(f"--config-file {name}: no such file here, nor in Detectron2's model zoo ({folder})")


def load_config_file(name: str, opts: Sequence[Any] = (), *, zenith: bool = False) -> LoadedConfig:
    """Load a config file by path or by its name in Detectron2's model zoo.

    A file given by path goes through :func:`zenith_det.config.load_config`. A zoo file keeps the recipe it
    was written for: where neither ``opts`` nor ``zenith`` say otherwise, ``SOLVER.OPTIMIZER`` is "SGD". Zoo
    files are part of the installed Detectron2 and are read by its own loader, since one of them
    (``Base-RetinaNet.yaml``) computes a value in a way that safe YAML refuses.

    Args:
        name: as for :func:`resolve_config_file`; "" for the defaults alone.
        opts: ``["SOLVER.MAX_ITER", "1000", …]``.
        zenith: put ZENITH under it: see :func:`put_zenith_under`.

    Raises:
        ConfigError: a file, key or value that cannot be used.
    """
    path = resolve_config_file(name) if name else ""
    if path == name:
        loaded = load_config(name or None, opts)
    else:
        loaded = load_config(None)
        loaded.config_file = name
        for key, value in leaves(_read_zoo_file(path)):
            loaded.override(key, value, source=name)
        loaded.override("SOLVER.OPTIMIZER", "SGD", source=f"the recipe of {name}")
        for key, value in pairs(opts):
            loaded.override(key, value)
        validate_config(loaded.cfg, loaded.sources)
    if zenith:
        put_zenith_under(loaded)
    return loaded


def put_zenith_under(loaded: LoadedConfig) -> None:
    """Train this configuration with ZENITH: warm-up, then the LR that the gradient norms give.

    Sets the optimizer and the LR schedule and drops the keys of a schedule that would otherwise multiply
    with ZENITH (``STEPS``, ``GAMMA`` …). Everything else stays: BASE_LR, momentum, weight decay, warm-up,
    MAX_ITER. A schedule named on the command line stays too: it was asked for.
    """
    source = "--zenith"
    if loaded.sources.get("SOLVER.OPTIMIZER") != COMMAND_LINE:
        loaded.override("SOLVER.OPTIMIZER", "ZENITH", source=source)
    if loaded.sources.get("SOLVER.LR_SCHEDULER_NAME") == COMMAND_LINE:
        return
    loaded.override("SOLVER.LR_SCHEDULER_NAME", "WarmupZenithLR", source=source)
    typed = loaded.sources.get("SOLVER.STEPS")
    loaded.override("SOLVER.STEPS", (), source=typed or source)
    for key in SCHEDULE_KEYS:
        # A file's schedule is gone; one typed on the command line is still to be reported as unused.
        if loaded.sources.get(key) != COMMAND_LINE:
            loaded.sources.pop(key, None)


def _zoo_folder(name: str) -> str:
    status = probe_model_zoo()
    if not status.usable:
        raise ConfigError(f"--config-file {name}: no such file, and {status.problem}")
    from detectron2 import model_zoo

    return os.path.join(os.path.dirname(model_zoo.__file__), "configs")


def _read_zoo_file(path: str) -> dict[str, Any]:
    from detectron2.config import CfgNode

    tree: dict[str, Any] = CfgNode.load_yaml_with_base(path, allow_unsafe=True)
    return tree
