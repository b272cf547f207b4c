"""Keys under the names that they once had: they work, and are told once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from zenith_det.config.defaults import MOVED_KEYS, ZENITH_DEFAULTS
from zenith_det.errors import ConfigError

logger = logging.getLogger(__name__)


def present_name(key: str) -> str:
    """The name that ``key`` has now."""
    if key not in MOVED_KEYS:
        return key
    _tell(key)
    return MOVED_KEYS[key]


def moved_value(cfg: Any, key: str) -> Any:
    """The value of one of :data:`MOVED_KEYS`'s new names, also where a Detectron2 project has set it by the old one.

    Raises:
        ConfigError: it is set by both, each with another value.
    """
    new = _get(cfg, key)
    old_name = next(old for old, name in MOVED_KEYS.items() if name == key)
    old = _get(cfg, old_name)
    if old is None or old == new:
        return new
    if new != _get(ZENITH_DEFAULTS, key):
        raise ConfigError(f"{key} is {new!r}, and its old name {old_name} is {old!r}: remove the old one")
    _tell(old_name)
    return old


def _get(cfg: Mapping[str, Any], key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = value.get(part)
    return value


@functools.cache
def _tell(old: str) -> None:
    logger.warning(
        "%s is %s now, as it concerns every optimizer: the old name works, too", old, MOVED_KEYS[old]
    )
