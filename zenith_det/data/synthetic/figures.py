"""Articulated figures with COCO's keypoints."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from zenith_det import opencv as cv2
from zenith_det.data.synthetic.sprites import SUPERSAMPLE, FloatArray, Sprite, random_colour, rotation, shade

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
    tilt = rotation(rng.uniform(-0.3, 0.3))
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
    lean = rotation(rng.normal(0, 0.2))
    return (joints @ lean).astype(np.float32), (head @ lean).astype(np.float32)


def figure(rng: np.random.Generator, size: float, x: float, y: float) -> Sprite:
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

    shirt, trousers, hair = random_colour(rng), random_colour(rng), random_colour(rng) * np.float32(0.35)
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
    light = shade(rng, height, width, rng.uniform(0.1, 0.4))
    sprite = Sprite(left, top, mask, lambda under: colours * light, 0, seen=seen, shadow=0.3)
    placed = (joints - low) * np.float32(scale) + np.array([left, top], np.float32)
    sprite.joints = placed.astype(np.float32, copy=False)
    return sprite
