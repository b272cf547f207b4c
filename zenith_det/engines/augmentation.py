"""``INPUT.AUGMENTATIONS``: transforms of ``torchvision.transforms.v2`` for images and their objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode, v2

from zenith_det.config.keys import did_you_mean
from zenith_det.data.pixel_formats import CHANNELS
from zenith_det.errors import ConfigError, one_line, quote

KEY = "INPUT.AUGMENTATIONS"
MIN_BOX_SIDE = 1e-5
#: Where the transforms are defined that leave every object where it is.
_PIXELS_ALONE = ("_color", "_misc", "_augment")
_CONTAINERS = ("Compose", "RandomApply", "RandomChoice", "RandomOrder")
#: Random draws that a configuration is tried with before a run.
_TRIALS = 4


@dataclass
class Labels:
    """The objects of one image, in pixels of it.

    Attributes:
        boxes: ``(N, 4)`` xyxy.
        masks: bool ``(N, H, W)``; ``None`` for models without.
        has_mask: bool ``(N,)``: the mask is known; the others are empty.
        keypoints: ``(N, K, 3)``: x, y, visibility; ``None`` for models without.
        kept: int64: which of the objects that there were these are.
    """

    boxes: Tensor
    masks: Tensor | None = None
    has_mask: Tensor | None = None
    keypoints: Tensor | None = None
    kept: Tensor | None = None


class Augmentations:
    """A sequence of transforms for uint8 images.

    All that they draw at random comes from torch's CPU generator.

    Args:
        entries: of ``INPUT.AUGMENTATIONS``: names, or mappings of a name to its arguments.
        image_format: of the images, ``"BGR"``, ``"RGB"`` or ``"L"``; for BGR the transforms see RGB.
        flip_indices: for each keypoint the one that a mirror image has in its place.

    Raises:
        ConfigError: a name or an argument that can't be used, or a transform that isn't one of images.
    """

    def __init__(
        self, entries: Sequence[Any], image_format: str = "BGR", flip_indices: Sequence[int] = ()
    ) -> None:
        if image_format not in ("BGR", "RGB", "L"):
            raise ConfigError(f"{KEY} is for images in BGR, RGB or L, not for INPUT.FORMAT {image_format!r}")
        self._swap = image_format == "BGR"
        self._channels = CHANNELS[image_format]
        self._flip_indices = torch.as_tensor(list(flip_indices), dtype=torch.int64)
        self.transforms = _built(entries)
        self.moves = any(_moves(one) for one in self.transforms)
        if self.moves and Points is None:
            raise ConfigError(f"{KEY} moves objects, which needs torchvision 0.23 or newer")
        self._try()

    def __call__(self, image: Tensor, labels: Callable[[], Labels]) -> tuple[Tensor, Labels | None]:
        """Transform an image and what is on it.

        Args:
            image: uint8 ``(C, H, W)``.
            labels: gives its objects; called only if they may have moved.

        Returns:
            The image, of another size perhaps, and its objects: those that are still on it, boxes cut at its edges
            and drawn around the masks where these are known, keypoints beyond it not labelled, and left and right
            ones exchanged in a mirror image. ``None`` where nothing has moved.

        Raises:
            ConfigError: a transform that can't take this image.
        """
        size = (int(image.shape[1]), int(image.shape[2]))
        pixels = tv_tensors.Image(image.flip(0) if self._swap else image)
        if not self.moves:
            return self._image(self._run({"image": pixels})["image"]), None
        before = labels()
        grid = _grid(*size)
        points = (
            grid if before.keypoints is None else torch.cat((grid, before.keypoints[..., :2].reshape(-1, 2)))
        )
        sample: dict[str, Any] = {
            "image": pixels,
            "boxes": tv_tensors.BoundingBoxes(before.boxes.float(), format="XYXY", canvas_size=size),
            "points": Points(points.float(), canvas_size=size),
        }
        if before.masks is not None:
            sample["masks"] = tv_tensors.Mask(before.masks.to(torch.uint8))
        after = self._run(sample)
        moved = after["points"].as_subclass(Tensor)
        now, moved = moved[: len(grid)], moved[len(grid) :]
        new_size = tuple(after["image"].shape[-2:])
        image = self._image(after["image"])
        if new_size == size and torch.allclose(now, grid, atol=1e-3):
            return image, None
        return image, self._settled(before, after, moved, new_size, mirrored=_mirrored(now))

    def _run(self, sample: dict[str, Any]) -> dict[str, Any]:
        for one in self.transforms:
            try:
                sample = one(sample)
            except Exception as error:  # what they raise for an image that they can't take is of any class
                height, width = sample["image"].shape[-2:]
                raise ConfigError(
                    f"{KEY}: {type(one).__name__} can't take an image of {width}x{height}: {one_line(str(error))}"
                ) from error
        return sample

    def _image(self, pixels: Tensor) -> Tensor:
        image = pixels.as_subclass(Tensor)
        return (image.flip(0) if self._swap else image).contiguous()

    def _settled(
        self, before: Labels, after: dict[str, Any], points: Tensor, size: tuple[int, ...], *, mirrored: bool
    ) -> Labels:
        height, width = size
        limit = torch.tensor([width, height] * 2, dtype=torch.float32)
        boxes = after["boxes"].as_subclass(Tensor).clamp(min=0).minimum(limit)
        keep = ((boxes[:, 2:] - boxes[:, :2]) > MIN_BOX_SIDE).all(dim=1)
        masks = None
        if before.masks is not None and before.has_mask is not None:
            masks = after["masks"].as_subclass(Tensor).bool()
            seen = masks.flatten(1).any(dim=1)
            keep &= seen | ~before.has_mask
            if seen.any():
                around = masks_to_boxes(masks[seen])
                boxes[seen] = torch.cat((around[:, :2], around[:, 2:] + 1), dim=1)
        keypoints = None
        if before.keypoints is not None:
            keypoints = before.keypoints.clone()
            keypoints[..., :2] = points.reshape(*keypoints.shape[:2], 2)
            outside = (keypoints[..., :2] < 0) | (keypoints[..., :2] > limit[:2])
            keypoints[outside.any(dim=-1)] = 0
            if mirrored and len(self._flip_indices):
                keypoints = keypoints[:, self._flip_indices]
            keypoints[keypoints[..., 2] == 0] = 0
            keypoints = keypoints[keep]
        return Labels(
            boxes[keep],
            None if masks is None else masks[keep],
            None if before.has_mask is None else before.has_mask[keep],
            keypoints,
            keep.nonzero().flatten(),
        )

    def _try(self) -> None:
        """Refuse what isn't an augmentation before a run begins."""
        for n in range(_TRIALS):
            image = (
                torch.arange(3 * 480 * 640, dtype=torch.int64)
                .remainder(256)
                .to(torch.uint8)
                .view(3, 480, 640)[: self._channels]
            )
            masks = torch.zeros(2, 480, 640, dtype=torch.bool)
            masks[0, 100:300, 100:300] = masks[1, 200:460, 50:600] = True
            boxes = torch.tensor([[100.0, 100.0, 300.0, 300.0], [50.0, 200.0, 600.0, 460.0]])
            labels = Labels(boxes, masks, torch.ones(2, dtype=torch.bool))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(n)
                names = ", ".join(type(one).__name__ for one in self.transforms)
                try:
                    image, _ = self(image, lambda labels=labels: labels)  # type: ignore[misc]
                except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
                    raise ConfigError(f"{KEY}: {names} can't be used here: {one_line(str(error))}") from error
            if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != self._channels:
                raise ConfigError(
                    f"{KEY}: {names} makes {image.dtype} of shape {tuple(image.shape)} of an image; it must stay "
                    f"uint8 and keep its channels, {self._channels} (MODEL.PIXEL_MEAN and PIXEL_STD normalize it)"
                )


def _built(entries: Sequence[Any]) -> list[v2.Transform]:
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(
            f"{KEY} is {quote(entries)}: give a list, such as [{{'ColorJitter': {{'brightness': 0.3}}}}]"
        )
    return [_build(entry) for entry in entries]


def _build(entry: Any) -> v2.Transform:
    name: Any
    arguments: Any = {}
    if isinstance(entry, str):
        name = entry
    elif isinstance(entry, Mapping) and len(entry) == 1:
        ((name, arguments),) = entry.items()
    else:
        raise ConfigError(f"{KEY}: {quote(entry)} is neither a name nor one name with its arguments")
    kind = getattr(v2, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, v2.Transform)) or kind in (v2.Transform, v2.Lambda):
        known = [n for n, one in vars(v2).items() if isinstance(one, type) and issubclass(one, v2.Transform)]
        raise ConfigError(
            f"{KEY}: torchvision.transforms.v2 has no {quote(name)}{did_you_mean(str(name), known)}"
        )
    if not isinstance(arguments, Mapping | None):
        raise ConfigError(
            f"{KEY}: {name} wants its arguments by name, such as {{'p': 0.5}}, not {quote(arguments)}"
        )
    given = {key: _argument(str(name), key, value) for key, value in (arguments or {}).items()}
    try:
        return kind(**given)
    except Exception as error:  # each checks its arguments in its own way
        raise ConfigError(f"{KEY}: {name} with {quote(arguments)}: {one_line(str(error))}") from error


def _argument(name: str, key: str, value: Any) -> Any:
    if key == "transforms" and name in _CONTAINERS:
        return _built(value)
    if key == "fill":
        # torchvision would fill masks with it, too: objects where there is no image.
        return {tv_tensors.Image: value, "others": 0}
    if key == "interpolation" and isinstance(value, str):
        try:
            return InterpolationMode(value)
        except ValueError:
            known = ", ".join(mode.value for mode in InterpolationMode)
            raise ConfigError(
                f"{KEY}: {name} has no interpolation {quote(value)}; there are {known}"
            ) from None
    return value


def _moves(one: v2.Transform) -> bool:
    """Whether a transform may move objects."""
    if type(one).__name__ in _CONTAINERS:
        return any(_moves(inner) for inner in one.transforms)
    return type(one).__module__.rpartition(".")[2] not in _PIXELS_ALONE


def _grid(height: int, width: int) -> Tensor:
    """Points ``(25, 2)`` all over an image, row by row, its corners among them."""
    x, y = torch.meshgrid(torch.linspace(0, width, 5), torch.linspace(0, height, 5), indexing="xy")
    return torch.stack((x.flatten(), y.flatten()), dim=1)


def _mirrored(points: Tensor) -> bool:
    """Whether the points of :func:`_grid` lie as in a mirror."""
    right, down = points[4] - points[0], points[20] - points[0]
    return bool(right[0] * down[1] - right[1] * down[0] < 0)


Points: Any = None
if hasattr(tv_tensors, "KeyPoints"):

    class Points(tv_tensors.KeyPoints):  # type: ignore[no-redef]
        """Points whose (0, 0) is an image's corner, as boxes have it, and not the middle of its first pixel.

        torchvision's flips alone take keypoints for indices of pixels.
        """

    @v2.functional.register_kernel(v2.functional.horizontal_flip, Points)
    def _flip(points: Any) -> Any:
        return _flipped(points, 0, points.canvas_size[1])

    @v2.functional.register_kernel(v2.functional.vertical_flip, Points)
    def _flip_vertically(points: Any) -> Any:
        return _flipped(points, 1, points.canvas_size[0])


def _flipped(points: Any, axis: int, side: int) -> Any:
    moved = points.as_subclass(Tensor).clone()
    moved[..., axis] = side - moved[..., axis]
    return tv_tensors.wrap(moved, like=points)
