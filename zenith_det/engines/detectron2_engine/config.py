"""This toolkit's configuration as Detectron2's own."""

from __future__ import annotations

from detectron2.config import CfgNode as Detectron2CfgNode
from detectron2.config import get_cfg

from zenith_det.config import CfgNode, LoadedConfig, add_zenith_config
from zenith_det.config.keys import leaves


def to_detectron2(source: LoadedConfig | CfgNode) -> Detectron2CfgNode:
    """The configuration as Detectron2's own, frozen."""
    ours = source.cfg if isinstance(source, LoadedConfig) else source
    cfg = get_cfg()
    add_zenith_config(cfg)
    for key, value in leaves(ours):
        *sections, name = key.split(".")
        node = cfg
        for section in sections:
            node = node[section]
        node[name] = value
    cfg.freeze()
    return cfg
