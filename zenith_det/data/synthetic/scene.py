"""A picture: what is where in it, and how it looks."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from zenith_det import opencv as cv2
from zenith_det.data.synthetic.figures import figure
from zenith_det.data.synthetic.shapes import distractor, shape
from zenith_det.data.synthetic.sprites import (
    SHAPE_NAMES,
    SUPERSAMPLE,
    ByteArray,
    Sprite,
    random_colour,
    shade,
    smooth_noise,
    texture,
)

#: An object with less than this part of it in view is not drawn at all (and so not annotated).
MIN_VISIBLE = 0.4
MIN_VISIBLE_PIXELS = 30


def overlap(sprite: Sprite, height: int, width: int) -> tuple[slice, slice, slice, slice]:
    """Rows and columns of the image that a crop covers, then rows and columns of the crop."""
    top, bottom = max(sprite.y, 0), min(sprite.y + sprite.height, height)
    left, right = max(sprite.x, 0), min(sprite.x + sprite.width, width)
    return (
        slice(top, max(bottom, top)),
        slice(left, max(right, left)),
        slice(top - sprite.y, max(bottom, top) - sprite.y),
        slice(left - sprite.x, max(right, left) - sprite.x),
    )


def magnified(part: slice) -> slice:
    return slice(part.start * SUPERSAMPLE, part.stop * SUPERSAMPLE)


def stack(sprites: list[Sprite], height: int, width: int) -> npt.NDArray[np.int16]:
    """Which sprite is in view where: (S*height, S*width), sprite index + 1, 0 for the background."""
    labels = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.int16)
    for index, sprite in enumerate(sprites):
        rows, columns, crop_rows, crop_columns = overlap(sprite, height, width)
        region = labels[magnified(rows), magnified(columns)]
        region[sprite.mask[magnified(crop_rows), magnified(crop_columns)] > 0] = index + 1
    return labels


def _place(
    rng: np.random.Generator, height: int, width: int, size: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float] | None:
    """A centre for an object of ``size`` that hides little of those already there, or None."""
    for _ in range(12):
        inset = size * rng.uniform(0.2, 0.5)
        if 2 * inset >= min(height, width):
            inset = min(height, width) * 0.45
        x, y = rng.uniform(inset, width - inset), rng.uniform(inset, height - inset)
        crowded = any(math.hypot(x - u, y - v) < 0.42 * (size + other) for u, v, other in taken)
        if not crowded:
            return x, y
    return None


def layout(rng: np.random.Generator, task: str, height: int, width: int) -> list[Sprite]:
    """Everything in the picture, back to front. Objects too hidden to be annotated are left out."""
    extent = min(height, width)
    area = height * width / 160**2
    sprites = [
        distractor(rng, extent, rng.uniform(0, width), rng.uniform(0, height))
        for _ in range(rng.poisson(4 * min(area, 4)))
    ]
    if rng.random() < 0.03:
        return sprites
    figures = task == "keypoints"
    smallest, largest = (40.0, 110.0) if figures else (10.0, 100.0)
    largest = max(min(largest, 0.8 * extent), smallest + 1)
    count = 1 + rng.poisson((1.2 if figures else 4.5) * min(max(area, 0.3), 6))
    taken: list[tuple[float, float, float]] = []
    for _ in range(count):
        share = rng.beta(2.6, 1.5)
        size = smallest * (largest / smallest) ** share
        position = _place(rng, height, width, size, taken)
        if position is None:
            continue
        taken.append((*position, size))
        if figures:
            sprites.append(figure(rng, size, *position))
        else:
            sprites.append(shape(rng, int(rng.integers(len(SHAPE_NAMES))), size, *position))
    if rng.random() < 0.08:
        member = rng.uniform(26, 34) if figures else rng.uniform(9, 14)
        spread = member * 1.2
        position = _place(rng, height, width, 3 * spread, taken)
        if position is not None:
            category = int(rng.integers(len(SHAPE_NAMES)))
            for _ in range(int(rng.integers(6, 12))):
                x, y = position + rng.normal(0, 0.55 * spread, 2)
                sprite = figure(rng, member, x, y) if figures else shape(rng, category, member, x, y)
                sprite.crowd = 0
                sprites.append(sprite)
    # A few distractors in front, for occlusion by things that are no objects.
    for _ in range(rng.poisson(0.6)):
        sprites.append(distractor(rng, extent, rng.uniform(0, width), rng.uniform(0, height)))

    while True:  # what is taken away uncovers others: each round leaves fewer, so this ends
        visible = np.bincount(stack(sprites, height, width).ravel(), minlength=len(sprites) + 1)[1:]
        kept = []
        for sprite, pixels in zip(sprites, visible, strict=True):
            whole = int(sprite.mask.sum())
            hidden = pixels < MIN_VISIBLE * whole or pixels < MIN_VISIBLE_PIXELS * SUPERSAMPLE**2
            if sprite.category < 0 or sprite.crowd >= 0 or not hidden:
                kept.append(sprite)
        if len(kept) == len(sprites):
            return sprites
        sprites = kept


def render(rng: np.random.Generator, sprites: list[Sprite], height: int, width: int) -> ByteArray:
    """Paint background and sprites, then light, blur and sensor noise: (height, width, 3) BGR."""
    first = random_colour(rng)
    second = np.clip(first + rng.uniform(-70, 70, 3).astype(np.float32), 0, 255)
    canvas = texture(rng, height, width, first, second)
    canvas += (smooth_noise(rng, height, width, rng.uniform(8, 40))[..., None] - 0.5) * rng.uniform(20, 70)
    for sprite in sprites:
        rows, columns, crop_rows, crop_columns = overlap(sprite, height, width)
        if rows.start == rows.stop or columns.start == columns.stop:
            continue
        cover = cv2.resize(
            sprite.mask.astype(np.float32), (sprite.width, sprite.height), interpolation=cv2.INTER_AREA
        )
        if sprite.shadow:
            moved = Sprite(sprite.x + 2, sprite.y + 2, sprite.mask, sprite.paint)
            r, c, cr, cc = overlap(moved, height, width)
            canvas[r, c] *= 1 - np.float32(sprite.shadow) * cv2.blur(cover, (3, 3))[cr, cc, None]
        region = canvas[rows, columns]
        alpha = cover[crop_rows, crop_columns, None]
        under = np.broadcast_to(region.mean(axis=(0, 1)), (sprite.height, sprite.width, 3)).astype(np.float32)
        region += alpha * (sprite.paint(under)[crop_rows, crop_columns] - region)
    canvas *= shade(rng, height, width, rng.uniform(0, 0.7)) * np.float32(rng.uniform(0.7, 1.15))
    if rng.random() < 0.3:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (3, 3), rng.uniform(0.3, 0.8)), dtype=np.float32)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(1, 8))
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)
