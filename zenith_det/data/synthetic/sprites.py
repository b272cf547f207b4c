"""What is placed on a picture: masks, colours and textures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zenith_det import opencv as cv2

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
SHAPE_NAMES = ("rectangle", "ellipse", "triangle", "star", "ring", "cross")
#: Masks are drawn this many times larger than the image, then averaged down: smooth edges.
SUPERSAMPLE = 4
#: The share of objects in a colour typical of their class, and how far hues stray (of 180, as in OpenCV).
TYPICAL_SHARE, TYPICAL_SPREAD = 0.95, 9.0


@dataclass
class Sprite:
    """Something placed on the picture: an object, a member of a crowd or a distractor."""

    x: int  # left of the crop, in pixels of the image; may be negative
    y: int
    mask: ByteArray  # (S*h, S*w), 0 or 1: the shape, S = SUPERSAMPLE
    paint: Callable[[FloatArray], FloatArray]  # (h, w, 3) background under the crop -> (h, w, 3) colours
    category: int = -1  # index into the class names; -1: a distractor
    crowd: int = -1  # number of the crowd region that it belongs to
    joints: FloatArray | None = None  # (17, 2), in pixels of the image
    seen: list[bool] = field(default_factory=list)  # per joint: not hidden by the figure itself
    shadow: float = 0.0

    @property
    def height(self) -> int:
        return self.mask.shape[0] // SUPERSAMPLE

    @property
    def width(self) -> int:
        return self.mask.shape[1] // SUPERSAMPLE


def random_colour(rng: np.random.Generator) -> FloatArray:
    """A random colour (BGR, 0-255), any hue, not too dark."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.1, 0.95), rng.uniform(60, 250)
    steps = (np.array([hue, hue + 4, hue + 2]) % 6).astype(np.float32)
    pure = np.clip(np.abs(steps - 3) - 1, 0, 1)
    return ((1 - saturation * (1 - pure)) * value).astype(np.float32)


def _contrasting(rng: np.random.Generator, other: FloatArray) -> FloatArray:
    for _ in range(12):
        colour = random_colour(rng)
        if float(np.abs(colour - other).sum()) > 127.5:
            return colour
    return np.where(other > 128, 30, 225).astype(np.float32)


def _typical_colour(rng: np.random.Generator, category: int, other: FloatArray) -> FloatArray:
    """A colour that the class often has: most objects of a class lie around one hue, some have any colour."""
    if rng.random() < TYPICAL_SHARE:
        for _ in range(8):
            hue = (category * 180 / len(SHAPE_NAMES) + rng.normal(0, TYPICAL_SPREAD)) % 180
            hsv = np.array([[[hue, rng.uniform(110, 255), rng.uniform(80, 255)]]], np.float32).astype(
                np.uint8
            )
            colour = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)
            if np.abs(colour - other).max() >= 80:
                return np.asarray(colour, dtype=np.float32)
    return _contrasting(rng, other)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> FloatArray:
    """Noise in 0-1 whose spots are about ``cell`` pixels wide, shape (height, width)."""
    grid = rng.random((max(2, math.ceil(height / cell)), max(2, math.ceil(width / cell))), dtype=np.float32)
    return np.asarray(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def texture(
    rng: np.random.Generator, height: int, width: int, first: FloatArray, second: FloatArray
) -> FloatArray:
    """A (height, width, 3) picture between two colours: plain, gradient, stripes, checks, dots or noise."""
    extent = max(height, width)
    angle = rng.uniform(0, math.pi)
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    along = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))
    kind = rng.choice(
        ["plain", "gradient", "stripes", "checks", "dots", "noise"], p=[0.15, 0.2, 0.2, 0.1, 0.1, 0.25]
    )
    blend: npt.NDArray[Any]
    if kind == "plain":
        blend = np.zeros((height, width), np.float32)
    elif kind == "gradient":
        blend = (along - along.min()) / max(float(np.ptp(along)), 1.0)
    elif kind == "noise":
        blend = smooth_noise(rng, height, width, max(2.0, extent * rng.uniform(0.05, 0.3)))
    else:
        across = y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle))
        period = rng.uniform(4, 12) if kind == "stripes" else rng.uniform(6, 14)
        wave = np.float32(2 * math.pi / period)
        if kind == "stripes":
            blend = 0.5 + rng.uniform(0.8, 3) * np.sin(along * wave)
        elif kind == "checks":
            blend = 0.5 + 3 * np.sin(along * wave) * np.sin(across * wave)
        else:
            blend = 3 * (np.sin(along * wave) * np.sin(across * wave) - 0.45)
    blend = np.clip(blend, 0, 1)[..., None]
    return (first + (second - first) * blend).astype(np.float32)


def shade(rng: np.random.Generator, height: int, width: int, strength: float) -> FloatArray:
    """A factor (height, width, 1): light that falls off in one direction."""
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :, None]
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None, None]
    return 1 + np.float32(strength) * (x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle)))


def rotation(angle: float) -> FloatArray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, s], [-s, c]], np.float32)


def fill(contours: list[FloatArray], size: float, x: float, y: float) -> tuple[int, int, ByteArray]:
    """Scale contours so that their longer side is ``size`` pixels, centre them on (x, y), fill them.

    Returns the crop's left and top in pixels and its supersampled mask.
    """
    points = np.concatenate(contours)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = size / float((high - low).max())
    shift = np.array([x, y], np.float32) - (low + high) / 2 * scale
    placed = [contour * scale + shift for contour in contours]
    points = np.concatenate(placed)
    left, top = (int(v) for v in np.floor(points.min(axis=0)) - 1)
    right, bottom = (int(v) for v in np.ceil(points.max(axis=0)) + 1)
    mask = np.zeros(((bottom - top) * SUPERSAMPLE, (right - left) * SUPERSAMPLE), np.uint8)
    origin = np.array([left, top], np.float32)
    fixed = [np.round((c - origin) * SUPERSAMPLE * 16 - 8).astype(np.int32) for c in placed]
    cv2.fillPoly(mask, fixed, 1, lineType=cv2.LINE_8, shift=4)
    return left, top, mask


def surface(rng: np.random.Generator, category: int = -1) -> Callable[[FloatArray], FloatArray]:
    """How a thing looks: two near colours with a texture, lit from a side, unlike what lies under it."""
    seed = int(rng.integers(2**63))

    def paint(under: FloatArray) -> FloatArray:
        own = np.random.default_rng(seed)
        height, width = under.shape[:2]
        below = under.mean(axis=(0, 1))
        first = _contrasting(own, below) if category < 0 else _typical_colour(own, category, below)
        second = np.clip(first + own.uniform(-80, 80, 3).astype(np.float32), 0, 255)
        picture = texture(own, height, width, first, second) * shade(
            own, height, width, own.uniform(0.1, 0.6)
        )
        return picture

    return paint
