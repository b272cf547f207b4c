"""Shapes of six classes, and clutter that is none of them."""

from __future__ import annotations

import math

import numpy as np

from zenith_det import opencv as cv2
from zenith_det.data.synthetic.sprites import (
    SHAPE_NAMES,
    SUPERSAMPLE,
    ByteArray,
    FloatArray,
    Sprite,
    fill,
    rotation,
    surface,
)


def _circle(count: int = 48) -> FloatArray:
    turn = np.arange(count) * (2 * math.pi / count)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)


def _outline(rng: np.random.Generator, name: str) -> list[FloatArray]:
    """Contours of a shape around the origin, about 2 wide; a second contour is a hole."""
    if name == "rectangle":
        aspect = rng.uniform(0.4, 1)
        return [np.array([[-1, -aspect], [1, -aspect], [1, aspect], [-1, aspect]], np.float32)]
    if name == "ellipse":
        return [_circle() * np.array([1, rng.uniform(0.5, 1)], np.float32)]
    if name == "triangle":
        corners = np.array([[-0.9, 0.7], [0.9, 0.7], [0, -0.9]]) + rng.uniform(-0.15, 0.15, (3, 2))
        return [corners.astype(np.float32)]
    if name == "star":
        radius = np.where(np.arange(10) % 2 == 0, 1, rng.uniform(0.38, 0.48))[:, None]
        return [(_circle(10) * radius).astype(np.float32)]
    if name == "ring":
        ring = _circle() * np.array([1, rng.uniform(0.75, 1)], np.float32)
        return [ring, ring * np.float32(rng.uniform(0.45, 0.62))]
    arm, reach = rng.uniform(0.26, 0.36), rng.uniform(0.8, 1)
    plus = [(-arm, -reach), (arm, -reach), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, reach)]
    plus += [(-arm, reach), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
    return [np.array(plus, np.float32)]


def shape(rng: np.random.Generator, category: int, size: float, x: float, y: float) -> Sprite:
    turn = rotation(rng.uniform(0, 2 * math.pi))
    contours = [contour @ turn for contour in _outline(rng, SHAPE_NAMES[category])]
    left, top, mask = fill(contours, size, x, y)
    return Sprite(left, top, mask, surface(rng, category), category, shadow=float(rng.choice([0.0, 0.35])))


def distractor(rng: np.random.Generator, extent: int, x: float, y: float) -> Sprite:
    """Clutter that is no object: a wavy line or a lobed blob."""
    if rng.random() < 0.6:
        count = 14
        steps = np.cumsum(rng.normal(0, 0.35, count)) + rng.uniform(0, 2 * math.pi)
        path = np.cumsum(np.stack([np.cos(steps), np.sin(steps)], axis=1), axis=0).astype(np.float32)
        path *= extent * rng.uniform(0.15, 0.7) / max(float(np.ptp(path, axis=0).max()), 1.0)
        thickness = max(2, round(SUPERSAMPLE * rng.uniform(0.7, 2.5)))
        margin = math.ceil(thickness / SUPERSAMPLE) + 1
        low = path.min(axis=0) - margin
        width, height = (int(v) for v in np.ceil(path.max(axis=0) + margin - low))
        mask: ByteArray = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)
        cv2.polylines(mask, [np.round((path - low) * SUPERSAMPLE).astype(np.int32)], False, 1, thickness)
        return Sprite(round(x) - width // 2, round(y) - height // 2, mask, surface(rng))
    # Two and three lobes: bulges without corners, so that no blob passes for a star or a cross.
    turn = np.arange(64) * (2 * math.pi / 64)
    two, three = (
        rng.uniform(0.15, 0.35) * np.sin(lobes * turn + rng.uniform(0, 2 * math.pi)) for lobes in (2, 3)
    )
    radius = 1 + (two + three)
    contour = (_circle(64) * radius[:, None]).astype(np.float32)
    left, top, mask = fill([contour], extent * rng.uniform(0.05, 0.22), x, y)
    return Sprite(left, top, mask, surface(rng))
