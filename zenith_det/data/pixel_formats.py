"""``INPUT.FORMAT``: what the channels of a network's input are, as in Detectron2."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from zenith_det.errors import ConfigError, quote

#: How many channels each has.
CHANNELS = {"BGR": 3, "RGB": 3, "L": 1, "YUV-BT.601": 3}
#: https://en.wikipedia.org/wiki/Y%E2%80%B2UV#SDTV_with_BT.470, the rows for Y, U and V, of values from 0 to 1.
RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])


def check_format(name: str) -> None:
    """Refuse a format that isn't in :data:`CHANNELS`.

    Raises:
        ConfigError: with those that are.
    """
    if name not in CHANNELS:
        raise ConfigError(f"INPUT.FORMAT is {quote(name)}: it must be one of {', '.join(CHANNELS)}")


def from_rgb(rgb: npt.NDArray[np.uint8], name: str) -> npt.NDArray[Any]:
    """An image in one of the formats, contiguous.

    Args:
        rgb: uint8 ``(H, W, 3)``.
        name: of the format.

    Returns:
        uint8 ``(H, W, 3)``; ``L``: uint8 ``(H, W, 1)``; ``YUV-BT.601``: float64 ``(H, W, 3)``, Y from 0 to 1, U and V
        around 0.

    Raises:
        ConfigError: no such format.
    """
    check_format(name)
    if name == "L":
        return np.array(Image.fromarray(np.ascontiguousarray(rgb)).convert("L"))[:, :, None]
    if name == "YUV-BT.601":
        return np.dot(rgb / 255.0, RGB_TO_YUV.T)
    return np.ascontiguousarray(rgb[:, :, ::-1] if name == "BGR" else rgb)


def to_rgb(pixels: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """The other way, for a picture to look at: uint8 ``(H, W, 3)``."""
    if name == "L":
        return np.repeat(pixels, 3, axis=2)
    if name == "YUV-BT.601":
        rgb = pixels @ np.linalg.inv(RGB_TO_YUV).T * 255
        return np.clip(np.round(rgb), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels[:, :, ::-1] if name == "BGR" else pixels)
