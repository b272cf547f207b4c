"""From a config file and the command line to one configuration that knows where each key was set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zenith_det.config.defaults import DETECTRON2_DEFAULTS, RENAMED_KEYS, add_zenith_config
from zenith_det.config.finding import find_config_file
from zenith_det.config.node import COMMAND_LINE, CfgNode, pairs
from zenith_det.config.validation import validate_config
from zenith_det.config.yaml_files import read_entries


@dataclass
class LoadedConfig:
    """A configuration and its history.

    Attributes:
        cfg: every key, not frozen (as Detectron2's ``get_cfg``: whoever starts a run freezes it).
        sources: each key that the user set, dotted, and where: ``{"SOLVER.STEPS": "configs/x.yaml"}``; a key
            from a ``_BASE_`` file names that file, an override ``"command line"``.
        config_file: as it was given; ``None`` where there was none.
    """

    cfg: CfgNode
    sources: dict[str, str] = field(default_factory=dict)
    config_file: str | None = None

    def override(self, key: str, value: Any, source: str = COMMAND_LINE) -> None:
        """Set one key after loading, and remember where that came from (``"--train-json"``).

        Raises:
            ConfigError: see :meth:`zenith_det.config.CfgNode.assign`.
        """
        if name := self.cfg.assign(key, value, source):
            self.sources[name] = source


def get_cfg() -> CfgNode:
    """Return a new configuration with Detectron2's keys and this toolkit's, all at their defaults."""
    cfg = CfgNode(DETECTRON2_DEFAULTS)
    add_zenith_config(cfg)
    for old_name, new_name in RENAMED_KEYS.items():
        cfg.register_renamed_key(old_name, new_name)
    cfg.close()
    return cfg


def load_config(config_file: str | None, opts: Sequence[Any] = ()) -> LoadedConfig:
    """Read a config file with its ``_BASE_`` files, then ``KEY VALUE`` overrides, and check the values.

    Args:
        config_file: a YAML file in Detectron2's format, by path or by name (see
            :func:`~zenith_det.config.finding.find_config_file`); ``None`` for the defaults alone. One of
            Detectron2's model zoo keeps the recipe it was written for: its ``SOLVER.OPTIMIZER`` is "SGD".
        opts: ``["SOLVER.MAX_ITER", "90000", …]``, texts or plain values.

    Raises:
        ConfigError: a file, key or value that can't be used, in one line: which, where, and what to do.
    """
    loaded = LoadedConfig(get_cfg(), config_file=config_file)
    if config_file is not None:
        found = find_config_file(config_file)
        for entry in read_entries(found.path):
            if name := loaded.cfg.merge_entry(entry):
                loaded.sources[name] = entry.file
        if found.origin == "zoo":
            loaded.override("SOLVER.OPTIMIZER", "SGD", source=f"the recipe of {config_file}")
    for key, value in pairs(opts):
        loaded.override(key, value)
    validate_config(loaded.cfg, loaded.sources)
    return loaded
