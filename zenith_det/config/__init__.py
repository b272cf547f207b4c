"""Configuration: Detectron2's keys and YAML format, this toolkit's own keys, and errors that name the key."""

from zenith_det.config.dataset_files import files_of, name_of_files, settle_files
from zenith_det.config.dataset_keys import follow_dataset
from zenith_det.config.defaults import add_zenith_config
from zenith_det.config.loading import LoadedConfig, get_cfg, load_config
from zenith_det.config.node import CfgNode
from zenith_det.config.unused import zenith_unused_keys
from zenith_det.config.validation import validate_config

__all__ = [
    "CfgNode",
    "LoadedConfig",
    "add_zenith_config",
    "files_of",
    "follow_dataset",
    "get_cfg",
    "load_config",
    "name_of_files",
    "settle_files",
    "validate_config",
    "zenith_unused_keys",
]
