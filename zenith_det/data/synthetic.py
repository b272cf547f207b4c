"""A synthetic COCO-format set: seeded, deterministic, any number of images, nothing to download.

Two tasks. ``instances`` draws textured, rotated, lit shapes of six classes that hide each other in front of
a cluttered background; ``keypoints`` draws articulated people-like figures with COCO's 17 keypoints. Both
have visible-part masks (polygons, compressed RLE, and uncompressed RLE for crowd regions), small objects,
crowd regions and a few images without objects, so that all that a real set asks of a reader is in them.

Image ``i`` of a split depends on the seed, the split, the size and ``i`` alone: a longer set begins with the
images of a shorter one. Images are PNG, so that the pixels are the same whatever decodes them.

How left differs from right on the figures: a figure seen from the front has a face and a shirt front, and its
left side is on the right of the picture; a figure seen from behind has neither, and its left side is on the
left. This survives a horizontal flip with left and right keypoints swapped, and only that: a code such as
"left limbs are red" would be contradicted by each flipped image.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_utils

from zenith_det import opencv as cv2
from zenith_det.data.metadata import COCO_KEYPOINT_NAMES, COCO_SKELETON
from zenith_det.errors import DatasetError

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

TASKS = ("instances", "keypoints")
SHAPE_NAMES = ("rectangle", "ellipse", "triangle", "star", "ring", "cross")

#: Changes whenever the same settings give other bytes, so that a set made by an older version is made again.
VERSION = 5
#: Masks are drawn this many times larger than the image, then averaged down: smooth edges.
SUPERSAMPLE = 4
#: An object with less than this part of it in view is not drawn at all (and so not annotated).
MIN_VISIBLE = 0.4
MIN_VISIBLE_PIXELS = 30
#: The share of objects in a colour typical of their class, and how far hues stray (of 180, as in OpenCV).
TYPICAL_SHARE, TYPICAL_SPREAD = 0.95, 9.0
MIN_SIZE, MAX_SIZE = 48, 4096
SETTINGS_FILE = "generator.json"


@dataclass(frozen=True)
class SplitFiles:
    """Where one split was written, and what is in it."""

    json_file: Path
    image_root: Path
    num_images: int
    num_annotations: int


@dataclass
class _Sprite:
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


# ---------------------------------------------------------------------------------------------- colour


def _colour(rng: np.random.Generator) -> FloatArray:
    """A random colour (BGR, 0-255), any hue, not too dark."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.1, 0.95), rng.uniform(60, 250)
    steps = (np.array([hue, hue + 4, hue + 2]) % 6).astype(np.float32)
    pure = np.clip(np.abs(steps - 3) - 1, 0, 1)
    return ((1 - saturation * (1 - pure)) * value).astype(np.float32)


def _contrasting(rng: np.random.Generator, other: FloatArray, distance: float = 75.0) -> FloatArray:
    for _ in range(12):
        colour = _colour(rng)
        if float(np.abs(colour - other).sum()) > 1.7 * distance:
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


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> FloatArray:
    """Noise in 0-1 whose spots are about ``cell`` pixels wide, shape (height, width)."""
    grid = rng.random((max(2, math.ceil(height / cell)), max(2, math.ceil(width / cell))), dtype=np.float32)
    return np.asarray(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def _texture(
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
        blend = _smooth_noise(rng, height, width, max(2.0, extent * rng.uniform(0.05, 0.3)))
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


def _shade(rng: np.random.Generator, height: int, width: int, strength: float) -> FloatArray:
    """A factor (height, width, 1): light that falls off in one direction."""
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :, None]
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None, None]
    return 1 + np.float32(strength) * (x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle)))


# ---------------------------------------------------------------------------------------------- shapes


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


def _rotation(angle: float) -> FloatArray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, s], [-s, c]], np.float32)


def _fill(contours: list[FloatArray], size: float, x: float, y: float) -> tuple[int, int, ByteArray]:
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


def _surface(rng: np.random.Generator, category: int = -1) -> Callable[[FloatArray], FloatArray]:
    """How a thing looks: two near colours with a texture, lit from a side, unlike what lies under it."""
    seed = int(rng.integers(2**63))

    def paint(under: FloatArray) -> FloatArray:
        own = np.random.default_rng(seed)
        height, width = under.shape[:2]
        below = under.mean(axis=(0, 1))
        first = _contrasting(own, below) if category < 0 else _typical_colour(own, category, below)
        second = np.clip(first + own.uniform(-80, 80, 3).astype(np.float32), 0, 255)
        picture = _texture(own, height, width, first, second) * _shade(
            own, height, width, own.uniform(0.1, 0.6)
        )
        return picture

    return paint


def _shape(rng: np.random.Generator, category: int, size: float, x: float, y: float) -> _Sprite:
    turn = _rotation(rng.uniform(0, 2 * math.pi))
    contours = [contour @ turn for contour in _outline(rng, SHAPE_NAMES[category])]
    left, top, mask = _fill(contours, size, x, y)
    return _Sprite(left, top, mask, _surface(rng, category), category, shadow=float(rng.choice([0.0, 0.35])))


def _distractor(rng: np.random.Generator, extent: int, x: float, y: float) -> _Sprite:
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
        return _Sprite(round(x) - width // 2, round(y) - height // 2, mask, _surface(rng))
    # Two and three lobes: bulges without corners, so that no blob passes for a star or a cross.
    turn = np.arange(64) * (2 * math.pi / 64)
    two, three = (
        rng.uniform(0.15, 0.35) * np.sin(lobes * turn + rng.uniform(0, 2 * math.pi)) for lobes in (2, 3)
    )
    radius = 1 + (two + three)
    contour = (_circle(64) * radius[:, None]).astype(np.float32)
    left, top, mask = _fill([contour], extent * rng.uniform(0.05, 0.22), x, y)
    return _Sprite(left, top, mask, _surface(rng))


# ---------------------------------------------------------------------------------------------- figures

_HEAD, _TORSO, _LEFT_ARM, _RIGHT_ARM, _LEFT_LEG, _RIGHT_LEG = range(1, 7)
#: The parts of a figure on which a keypoint is in plain view, in the order of COCO_KEYPOINT_NAMES.
_SEEN_ON = (
    (_HEAD,), (_HEAD,), (_HEAD,), (_HEAD,), (_HEAD,),
    (_TORSO, _LEFT_ARM), (_TORSO, _RIGHT_ARM), (_LEFT_ARM,), (_RIGHT_ARM,), (_LEFT_ARM,), (_RIGHT_ARM,),
    (_TORSO, _LEFT_LEG), (_TORSO, _RIGHT_LEG), (_LEFT_LEG,), (_RIGHT_LEG,), (_LEFT_LEG,), (_RIGHT_LEG,),
)  # fmt: skip


def _pose(rng: np.random.Generator, front: bool) -> tuple[FloatArray, FloatArray]:
    """Joints of a figure about 1 tall: (17, 2), and the centre of its head (2,); y points down."""
    side = 1.0 if front else -1.0  # the side of the picture on which the figure's left is
    width = rng.uniform(0.75, 1.1)

    def reach(start: npt.NDArray[Any], length: float, angle: float, outward: float) -> npt.NDArray[Any]:
        """``length`` from start, ``angle`` away from straight down, towards ``outward`` (-1 or 1)."""
        return start + length * np.array([outward * math.sin(angle), math.cos(angle)])

    joints = np.zeros((17, 2))
    neck = np.array([0.0, -0.31])
    head = neck + np.array([rng.uniform(-0.02, 0.02), -0.125])
    tilt = _rotation(rng.uniform(-0.3, 0.3))
    look = rng.uniform(-0.02, 0.02)
    face = np.array([[look, 0.02], [0.036 * side + look, -0.02], [-0.036 * side + look, -0.02]])
    ears = np.array([[0.085 * side, 0.0], [-0.085 * side, 0.0]])
    joints[:5] = head + np.concatenate([face, ears]) @ tilt
    for left, outward in ((0, side), (1, -side)):  # 0: the figure's left limbs
        shoulder = neck + np.array([outward * 0.125 * width, 0.02])
        elbow_angle = rng.uniform(0.05, 2.4)
        elbow = reach(shoulder, 0.165, elbow_angle, outward)
        wrist = reach(elbow, 0.155, elbow_angle + rng.uniform(-1.6, 1.4), outward)
        hip = np.array([outward * 0.075 * width, 0.0])
        knee_angle = rng.uniform(-0.1, 0.85)
        knee = reach(hip, 0.22, knee_angle, outward)
        ankle = reach(knee, 0.215, knee_angle + rng.uniform(-1.0, 0.3), outward)
        joints[[5 + left, 7 + left, 9 + left, 11 + left, 13 + left, 15 + left]] = [
            shoulder, elbow, wrist, hip, knee, ankle,
        ]  # fmt: skip
    lean = _rotation(rng.normal(0, 0.2))
    return (joints @ lean).astype(np.float32), (head @ lean).astype(np.float32)


def _figure(rng: np.random.Generator, size: float, x: float, y: float) -> _Sprite:
    """A figure whose longer side is about ``size`` pixels, its middle at (x, y)."""
    front = bool(rng.random() < 0.65)
    joints, head = _pose(rng, front)
    points = np.concatenate([joints, head[None] + 0.12, head[None] - 0.12])
    low, high = points.min(axis=0) - 0.05, points.max(axis=0) + 0.05
    scale = size / float((high - low).max())
    left, top = math.floor(x - (high - low)[0] * scale / 2), math.floor(y - (high - low)[1] * scale / 2)
    width, height = (math.ceil(v) + 1 for v in (high - low) * scale)
    unit = scale * SUPERSAMPLE
    joints_fine = (joints - low) * unit
    head_fine = (head - low) * unit
    picture = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE, 3), np.uint8)
    parts = np.zeros(picture.shape[:2], np.uint8)

    shirt, trousers, hair = _colour(rng), _colour(rng), _colour(rng) * np.float32(0.35)
    skin = np.array([[150, 190, 235], [105, 150, 205], [65, 95, 140]], np.float32)[rng.integers(3)]

    def tone(colour: FloatArray, factor: float) -> tuple[float, float, float]:
        b, g, r = (float(v) for v in np.clip(colour * factor, 0, 255))
        return b, g, r

    def at(point: npt.NDArray[np.floating[Any]]) -> tuple[int, int]:
        return round(float(point[0])), round(float(point[1]))

    def limb(
        a: FloatArray, b: FloatArray, thick: float, colour: tuple[float, float, float], part: int
    ) -> None:
        thickness = max(1, round(thick * unit))
        cv2.line(picture, at(a), at(b), colour, thickness)
        cv2.line(parts, at(a), at(b), part, thickness)

    def disc(
        point: npt.NDArray[np.floating[Any]], radius: float, colour: tuple[float, float, float], part: int
    ) -> None:
        cv2.circle(picture, at(point), max(1, round(radius * unit)), colour, -1)
        cv2.circle(parts, at(point), max(1, round(radius * unit)), part, -1)

    def patch(corners: list[FloatArray], colour: tuple[float, float, float], part: int) -> None:
        polygon = np.round(np.stack(corners)).astype(np.int32)
        cv2.fillConvexPoly(picture, polygon, colour)
        cv2.fillConvexPoly(parts, polygon, part)

    def arm(which: int) -> None:
        part = (_LEFT_ARM, _RIGHT_ARM)[which]
        shoulder, elbow, wrist = joints_fine[[5 + which, 7 + which, 9 + which]]
        limb(shoulder, elbow, 0.075, tone(shirt, 0.78), part)
        limb(elbow, wrist, 0.06, tone(skin, 0.92), part)
        disc(wrist, 0.042, tone(skin, 1.05), part)

    def leg(which: int) -> None:
        part = (_LEFT_LEG, _RIGHT_LEG)[which]
        hip, knee, ankle = joints_fine[[11 + which, 13 + which, 15 + which]]
        limb(hip, knee, 0.1, tone(trousers, 1.0), part)
        limb(knee, ankle, 0.08, tone(trousers, 0.8), part)
        disc(ankle, 0.05, tone(hair, 1.0), part)

    arms = [0, 1] if rng.random() < 0.5 else [1, 0]
    behind = [which for which in arms if rng.random() < 0.25]
    for which in behind:
        arm(which)
    for which in arms:
        leg(which)
    torso = [joints_fine[5], joints_fine[6], joints_fine[12], joints_fine[11]]
    for a, b in zip(torso, torso[1:] + torso[:1], strict=True):
        limb(a, b, 0.07, tone(shirt, 1.0), _TORSO)
    patch(torso, tone(shirt, 1.0), _TORSO)
    disc((joints_fine[5] + joints_fine[6]) / 2 * 0.6 + head_fine * 0.4, 0.05, tone(skin, 0.85), _HEAD)
    middle_top = (joints_fine[5] + joints_fine[6]) / 2
    middle_low = (joints_fine[11] + joints_fine[12]) / 2
    if front:  # an open shirt front: with the face, what tells a front from a back
        inset = (joints_fine[5] - joints_fine[6]) * 0.3
        patch(
            [middle_top + inset, middle_top - inset, middle_top * 0.3 + middle_low * 0.7],
            tone(skin, 1.0),
            _TORSO,
        )
    for which in arms:
        if which not in behind:
            arm(which)
    disc(head_fine, 0.1, tone(hair, 1.0), _HEAD)
    if front:
        centre = joints_fine[:3].mean(axis=0) * 0.5 + head_fine * 0.5
        disc(centre + (middle_low - middle_top) * 0.06, 0.082, tone(skin, 1.0), _HEAD)
        for eye in (1, 2):
            disc(joints_fine[eye], 0.02, (25, 25, 25), _HEAD)
        disc(joints_fine[0], 0.017, tone(skin, 0.6), _HEAD)

    rows = np.clip(np.floor(joints_fine[:, 1]).astype(int), 0, parts.shape[0] - 1)
    columns = np.clip(np.floor(joints_fine[:, 0]).astype(int), 0, parts.shape[1] - 1)
    seen = [int(parts[r, c]) in allowed for r, c, allowed in zip(rows, columns, _SEEN_ON, strict=True)]
    if not front:
        seen[:3] = [False] * 3
    mask = (parts > 0).astype(np.uint8)
    # Averaged together with its own mask, so that no black from outside the figure bleeds into its edge.
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    cover = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    colours = (small / np.maximum(cover, 1e-3)[..., None]).astype(np.float32)
    light = _shade(rng, height, width, rng.uniform(0.1, 0.4))
    sprite = _Sprite(left, top, mask, lambda under: colours * light, 0, seen=seen, shadow=0.3)
    placed = (joints - low) * np.float32(scale) + np.array([left, top], np.float32)
    sprite.joints = placed.astype(np.float32, copy=False)
    return sprite


# ---------------------------------------------------------------------------------------------- picture


def _overlap(sprite: _Sprite, height: int, width: int) -> tuple[slice, slice, slice, slice]:
    """Rows and columns of the image that a crop covers, then rows and columns of the crop."""
    top, bottom = max(sprite.y, 0), min(sprite.y + sprite.height, height)
    left, right = max(sprite.x, 0), min(sprite.x + sprite.width, width)
    return (
        slice(top, max(bottom, top)),
        slice(left, max(right, left)),
        slice(top - sprite.y, max(bottom, top) - sprite.y),
        slice(left - sprite.x, max(right, left) - sprite.x),
    )


def _fine(part: slice) -> slice:
    return slice(part.start * SUPERSAMPLE, part.stop * SUPERSAMPLE)


def _stack(sprites: list[_Sprite], height: int, width: int) -> npt.NDArray[np.int16]:
    """Which sprite is in view where: (S*height, S*width), sprite index + 1, 0 for the background."""
    labels = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.int16)
    for index, sprite in enumerate(sprites):
        rows, columns, crop_rows, crop_columns = _overlap(sprite, height, width)
        region = labels[_fine(rows), _fine(columns)]
        region[sprite.mask[_fine(crop_rows), _fine(crop_columns)] > 0] = index + 1
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


def _layout(rng: np.random.Generator, task: str, height: int, width: int) -> list[_Sprite]:
    """Everything in the picture, back to front. Objects too hidden to be annotated are left out."""
    extent = min(height, width)
    area = height * width / 160**2
    sprites = [
        _distractor(rng, extent, rng.uniform(0, width), rng.uniform(0, height))
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
            sprites.append(_figure(rng, size, *position))
        else:
            sprites.append(_shape(rng, int(rng.integers(len(SHAPE_NAMES))), size, *position))
    if rng.random() < 0.08:
        member = rng.uniform(26, 34) if figures else rng.uniform(9, 14)
        spread = member * 1.2
        position = _place(rng, height, width, 3 * spread, taken)
        if position is not None:
            category = int(rng.integers(len(SHAPE_NAMES)))
            for _ in range(int(rng.integers(6, 12))):
                x, y = position + rng.normal(0, 0.55 * spread, 2)
                sprite = _figure(rng, member, x, y) if figures else _shape(rng, category, member, x, y)
                sprite.crowd = 0
                sprites.append(sprite)
    # A few distractors in front, for occlusion by things that are no objects.
    for _ in range(rng.poisson(0.6)):
        sprites.append(_distractor(rng, extent, rng.uniform(0, width), rng.uniform(0, height)))

    while True:  # what is taken away uncovers others: each round leaves fewer, so this ends
        visible = np.bincount(_stack(sprites, height, width).ravel(), minlength=len(sprites) + 1)[1:]
        kept = []
        for sprite, pixels in zip(sprites, visible, strict=True):
            whole = int(sprite.mask.sum())
            hidden = pixels < MIN_VISIBLE * whole or pixels < MIN_VISIBLE_PIXELS * SUPERSAMPLE**2
            if sprite.category < 0 or sprite.crowd >= 0 or not hidden:
                kept.append(sprite)
        if len(kept) == len(sprites):
            return sprites
        sprites = kept


def _render(rng: np.random.Generator, sprites: list[_Sprite], height: int, width: int) -> ByteArray:
    """Paint background and sprites, then light, blur and sensor noise: (height, width, 3) BGR."""
    first = _colour(rng)
    second = np.clip(first + rng.uniform(-70, 70, 3).astype(np.float32), 0, 255)
    canvas = _texture(rng, height, width, first, second)
    canvas += (_smooth_noise(rng, height, width, rng.uniform(8, 40))[..., None] - 0.5) * rng.uniform(20, 70)
    for sprite in sprites:
        rows, columns, crop_rows, crop_columns = _overlap(sprite, height, width)
        if rows.start == rows.stop or columns.start == columns.stop:
            continue
        cover = cv2.resize(
            sprite.mask.astype(np.float32), (sprite.width, sprite.height), interpolation=cv2.INTER_AREA
        )
        if sprite.shadow:
            moved = _Sprite(sprite.x + 2, sprite.y + 2, sprite.mask, sprite.paint)
            r, c, cr, cc = _overlap(moved, height, width)
            canvas[r, c] *= 1 - np.float32(sprite.shadow) * cv2.blur(cover, (3, 3))[cr, cc, None]
        region = canvas[rows, columns]
        alpha = cover[crop_rows, crop_columns, None]
        under = np.broadcast_to(region.mean(axis=(0, 1)), (sprite.height, sprite.width, 3)).astype(np.float32)
        region += alpha * (sprite.paint(under)[crop_rows, crop_columns] - region)
    canvas *= _shade(rng, height, width, rng.uniform(0, 0.7)) * np.float32(rng.uniform(0.7, 1.15))
    if rng.random() < 0.3:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (3, 3), rng.uniform(0.3, 0.8)), dtype=np.float32)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(1, 8))
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- annotations


def _to_image(fine: ByteArray, rows: slice, columns: slice, height: int, width: int) -> ByteArray:
    """The whole image's 0/1 mask from a supersampled crop's: a pixel counts when half of it is covered."""
    mask = np.zeros((height, width), np.uint8)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    mask[rows, columns] = cv2.resize(fine.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5
    return mask


def _polygons(fine: ByteArray, left: int, top: int) -> list[list[float]] | None:
    """Outlines of a supersampled crop in image coordinates; None when they don't say it (holes, crumbs)."""
    contours, hierarchy = cv2.findContours(np.ascontiguousarray(fine), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    polygons = []
    for contour, links in zip(contours, hierarchy[0] if len(contours) else [], strict=True):
        area = cv2.contourArea(contour) / SUPERSAMPLE**2
        if links[3] >= 0:
            if area > 3:
                return None
            continue
        simple = cv2.approxPolyDP(contour, 0.3 * SUPERSAMPLE, True)[:, 0]
        if area < 3 or len(simple) < 3:
            continue
        points = (simple + 0.5) / SUPERSAMPLE + np.array([left, top])
        polygons.append([round(float(v), 2) for v in points.ravel()])
    return polygons or None


def _uncompressed(mask: ByteArray) -> dict[str, Any]:
    """COCO's uncompressed run-length form: run lengths down the columns, the first of zeros."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    if counts[-1] == 0:
        counts.pop()
    return {"size": [mask.shape[0], mask.shape[1]], "counts": counts}


def _annotate(
    rng: np.random.Generator, sprites: list[_Sprite], task: str, height: int, width: int
) -> list[dict[str, Any]]:
    labels = _stack(sprites, height, width)
    annotations: list[dict[str, Any]] = []

    def add(sprite: _Sprite, segmentation: Any, rle: Any) -> dict[str, Any]:
        annotation = {
            "category_id": sprite.category + 1,
            "iscrowd": int(sprite.crowd >= 0),
            "bbox": [float(v) for v in mask_utils.toBbox(rle)],
            "area": float(mask_utils.area(rle)),
            "segmentation": segmentation,
        }
        if task == "keypoints":
            annotation["keypoints"] = [0] * (3 * len(COCO_KEYPOINT_NAMES))
            annotation["num_keypoints"] = 0
        annotations.append(annotation)
        return annotation

    for index, sprite in enumerate(sprites):
        if sprite.category < 0 or sprite.crowd >= 0:
            continue
        rows, columns, _, _ = _overlap(sprite, height, width)
        fine = (labels[_fine(rows), _fine(columns)] == index + 1).astype(np.uint8)
        polygons = _polygons(fine, columns.start, rows.start)
        if rng.random() < 0.15:
            polygons = None
        if polygons is None:
            rle = mask_utils.encode(np.asfortranarray(_to_image(fine, rows, columns, height, width)))
            annotation = add(sprite, {"size": rle["size"], "counts": rle["counts"].decode("ascii")}, rle)
        else:
            # Area and box are those of the polygons as COCO draws them, so that they agree to the pixel.
            rle = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
            annotation = add(sprite, polygons, rle)
        if sprite.joints is not None:
            keypoints: list[int] = []
            for (x, y), seen in zip(sprite.joints, sprite.seen, strict=True):
                if not (0 <= x < width and 0 <= y < height):
                    keypoints += [0, 0, 0]
                    continue
                in_view = labels[int(y * SUPERSAMPLE), int(x * SUPERSAMPLE)] == index + 1
                keypoints += [int(x), int(y), 2 if seen and in_view else 1]
            annotation["keypoints"] = keypoints
            annotation["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])

    members = [index for index, sprite in enumerate(sprites) if sprite.crowd >= 0]
    if members:
        whole = slice(0, height), slice(0, width)
        mask = _to_image(np.isin(labels, np.array(members) + 1).astype(np.uint8), *whole, height, width)
        if mask.sum() >= MIN_VISIBLE_PIXELS:
            add(sprites[members[0]], _uncompressed(mask), mask_utils.encode(np.asfortranarray(mask)))
    return annotations


def _image_size(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """(height, width): the longer side is ``size``; square, landscape or portrait."""
    short = size * 3 // 4
    return [(size, size), (short, size), (size, short)][int(rng.choice(3, p=[0.4, 0.35, 0.25]))]


def draw_image(
    task: str, size: int, seed: int, split: int, index: int
) -> tuple[ByteArray, list[dict[str, Any]]]:
    """Draw one image of the set and describe it.

    Args:
        task: ``instances`` or ``keypoints``.
        size: the longer side in pixels.
        seed, split, index: name the image; the same three give the same image.

    Returns:
        The image, uint8 (H, W, 3) BGR, and its annotations: COCO dicts without ``id`` and ``image_id``.
    """
    rng = np.random.default_rng([seed, split, index, TASKS.index(task)])
    height, width = _image_size(rng, size)
    sprites = _layout(rng, task, height, width)
    return _render(rng, sprites, height, width), _annotate(rng, sprites, task, height, width)


def categories(task: str) -> list[dict[str, Any]]:
    """The ``categories`` of the annotation files."""
    if task == "keypoints":
        skeleton = [list(bone) for bone in COCO_SKELETON]
        return [
            {
                "id": 1,
                "name": "person",
                "supercategory": "person",
                "keypoints": list(COCO_KEYPOINT_NAMES),
                "skeleton": skeleton,
            }
        ]
    return [
        {"id": index + 1, "name": name, "supercategory": "shape"} for index, name in enumerate(SHAPE_NAMES)
    ]


def split_files(output: str | os.PathLike[str], split: str, task: str) -> tuple[Path, Path]:
    """(annotation file, image folder) of a split in a generated set's folder."""
    stem = "instances" if task == "instances" else "person_keypoints"
    return Path(output) / "annotations" / f"{stem}_{split}.json", Path(output) / split


def _write_split(
    output: Path, split: str, number: int, count: int, size: int, seed: int, task: str
) -> SplitFiles:
    json_file, image_root = split_files(output, split, task)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    image_root.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        picture, described = draw_image(task, size, seed, number, index)
        image_id = index + 1
        file_name = f"{image_id:06d}.png"
        # Level 1: these noisy images hardly get smaller at higher ones, only slower.
        if not cv2.imwrite(str(image_root / file_name), picture, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
            raise DatasetError(
                f"{image_root / file_name}: can't be written; is the disk full or the folder protected?"
            )
        height, width = picture.shape[:2]
        images.append(
            {"id": image_id, "file_name": file_name, "width": width, "height": height, "license": 1}
        )
        for annotation in described:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    content = {
        "info": {"description": f"zenith_det synthetic {task}, {split}", "version": str(VERSION)},
        "licenses": [
            {"id": 1, "name": "CC0-1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}
        ],
        "images": images,
        "annotations": annotations,
        "categories": categories(task),
    }
    json_file.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    return SplitFiles(json_file, image_root, len(images), len(annotations))


def generate(
    output: str | os.PathLike[str],
    *,
    train: int = 1000,
    val: int = 200,
    size: int = 160,
    seed: int = 0,
    task: str = "instances",
) -> dict[str, SplitFiles]:
    """Write a synthetic set: ``annotations/*.json``, ``train/*.png`` and ``val/*.png`` under ``output``.

    A folder that already holds a set made with these settings is left as it is.

    Args:
        output: the folder; made when missing.
        train, val: number of images in each split; 0 leaves the split out.
        size: longer side of the images in pixels, 48 to 4096.
        seed: any non-negative integer; the same settings and seed give the same bytes.
        task: ``instances`` (boxes and masks of six shapes) or ``keypoints`` (figures, COCO's 17 keypoints).

    Returns:
        Per split, its files and counts.

    Raises:
        DatasetError: settings out of range, or ``output`` holds something that this generator didn't write.
    """
    if task not in TASKS:
        raise DatasetError(f"task {task!r} is unknown: choose from {', '.join(TASKS)}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise DatasetError(f"size {size} is out of range: choose {MIN_SIZE} to {MAX_SIZE} pixels")
    if train < 0 or val < 0 or train + val == 0:
        raise DatasetError(f"train {train} and val {val}: numbers of images must not be negative, nor both 0")
    if seed < 0:
        raise DatasetError(f"seed {seed} is negative: choose 0 or more")
    output = Path(output)
    settings = {"version": VERSION, "task": task, "train": train, "val": val, "size": size, "seed": seed}
    record = output / SETTINGS_FILE
    try:
        previous = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if previous is not None and previous.get("settings") == settings:
            splits = previous["splits"]
            return {
                name: SplitFiles(*split_files(output, name, task), counts["images"], counts["annotations"])
                for name, counts in splits.items()
            }
        if previous is None and output.is_dir() and any(output.iterdir()):
            raise DatasetError(
                f"{output} is not empty and wasn't written by this generator: empty it or choose another"
            )
        output.mkdir(parents=True, exist_ok=True)
        # While files are being replaced the record must match neither the old set nor the new one.
        record.write_text(json.dumps({"settings": None}), encoding="utf-8")
        written = {}
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            _, image_root = split_files(output, split, task)
            for stale in image_root.glob("[0-9]*.png"):
                stale.unlink()
            if count:
                written[split] = _write_split(output, split, number, count, size, seed, task)
        counted = {k: {"images": v.num_images, "annotations": v.num_annotations} for k, v in written.items()}
        record.write_text(json.dumps({"settings": settings, "splits": counted}), encoding="utf-8")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DatasetError(f"{output}: the synthetic set can't be written: {error}") from error
    return written
