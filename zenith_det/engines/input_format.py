"""Whether ``INPUT.FORMAT`` and the channels that a model normalizes go together."""

from __future__ import annotations

from typing import Any

from zenith_det.data.pixel_formats import CHANNELS
from zenith_det.errors import ConfigError


def check_channels(cfg: Any) -> None:
    """Refuse ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD`` for another number of channels.

    A grey image goes into a model of three channels as into one of one: it is the same in each.

    Raises:
        ConfigError: naming the keys.
    """
    model, name = cfg.MODEL, cfg.INPUT.FORMAT
    mean, std = len(model.PIXEL_MEAN), len(model.PIXEL_STD)
    if mean != std:
        raise ConfigError(
            f"MODEL.PIXEL_MEAN has {mean} entries and MODEL.PIXEL_STD {std}: both must have one for each channel"
        )
    channels = CHANNELS.get(name, mean)
    if mean != channels and (channels, mean) != (1, 3):
        wanted = "1, or 3 for a model of three channels" if channels == 1 else str(channels)
        raise ConfigError(
            f"MODEL.PIXEL_MEAN and PIXEL_STD have {mean} {'entry' if mean == 1 else 'entries'}, but INPUT.FORMAT "
            f"{name} needs {wanted}"
        )
