"""What a model found in one image, as arrays, and what people do with it next."""

from __future__ import annotations

import importlib
import inspect
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from zenith_det.data import DatasetMetadata, read_image
from zenith_det.errors import MissingLibraryError, UserError, listed, one_line
from zenith_det.evaluation import decode_masks, detections_to_results, encode_masks
from zenith_det.files import write_whole

__all__ = ["Prediction"]


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The objects that a model found in one image, best first.

    ``len(prediction)`` is their number. An index, a slice, a boolean array or a list of indices picks some of them, as
    another ``Prediction``: ``prediction[0]``, ``prediction[prediction.scores > 0.9]``. A loop over it gives each
    object as a ``Prediction`` of one.

    Attributes:
        boxes: float32 ``(N, 4)``: x0, y0, x1, y1 in pixels of the image; (0, 0) is its upper left corner.
        scores: float32 ``(N,)``, from 0 to 1.
        classes: int64 ``(N,)``: indices into ``metadata.thing_classes``.
        metadata: names of classes and keypoints, category ids, the skeleton.
        keypoints: float32 ``(N, K, 3)``: x, y in pixels, and a score, which isn't a probability and compares between
            keypoints of one model; ``None`` for a model without them. Names are ``metadata.keypoint_names``.
        size: height and width of the image, in pixels.
        path: the file; ``None`` for an array.
        frame: number in the video, from 0; ``None`` for an image.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    metadata: DatasetMetadata
    size: tuple[int, int]
    keypoints: npt.NDArray[np.float32] | None = None
    path: Path | None = None
    frame: int | None = None
    # Masks as an array, or as run lengths where many predictions are held at a time.
    _masks: npt.NDArray[np.bool_] | Sequence[dict[str, Any]] | None = None
    _pixels: npt.NDArray[np.uint8] | None = None
    _value_range: tuple[float, ...] = ()  # by which the file is read again

    # ---- looking

    @property
    def class_names(self) -> list[str]:
        """The name of each object's class."""
        return [self.metadata.thing_classes[index] for index in self.classes]

    @property
    def masks(self) -> npt.NDArray[np.bool_] | None:
        """bool ``(N, H, W)`` at the image's size; ``None`` for a model without masks."""
        if self._masks is None or isinstance(self._masks, np.ndarray):
            return self._masks
        return decode_masks(list(self._masks), self.size)

    @property
    def image(self) -> npt.NDArray[np.uint8]:
        """The image, BGR uint8 ``(H, W, 3)``; a file may be read again.

        Raises:
            ImageError: it can't be any more.
        """
        if self._pixels is not None:
            return self._pixels
        assert self.path is not None
        return read_image(self.path, value_range=self._value_range)

    def __len__(self) -> int:
        return len(self.boxes)

    def __str__(self) -> str:
        counts = Counter(self.class_names).most_common()
        where = str(self.path) if self.path else f"image of {self.size[1]} x {self.size[0]} pixels"
        frame = "" if self.frame is None else f", frame {self.frame}"
        found = listed([f"{number} {name}" for name, number in counts]) or "nothing"
        return one_line(f"{where}{frame}: {found}", 2000)

    def __repr__(self) -> str:
        return f"<Prediction {self}>"

    # ---- picking

    def __getitem__(self, index: Any) -> Prediction:
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"object {index} of {len(self)}")
            index = [int(index)]
        chosen = np.arange(len(self))[np.asarray(index, int) if _is_empty_list(index) else index]
        masks = self._masks
        if masks is not None:
            masks = masks[chosen] if isinstance(masks, np.ndarray) else [masks[n] for n in chosen]
        return replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            classes=self.classes[chosen],
            keypoints=None if self.keypoints is None else self.keypoints[chosen],
            _masks=masks,
        )

    def __iter__(self) -> Iterator[Prediction]:
        return (self[index] for index in range(len(self)))

    def above(self, score: float) -> Prediction:
        """The objects with at least this score."""
        return self[self.scores >= score]

    def of_class(self, *names: str) -> Prediction:
        """The objects of these classes.

        Raises:
            UserError: a class that the model doesn't know.
        """
        known = self.metadata.thing_classes
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"the model knows no class {listed(unknown)}: it knows {listed(known)}")
        return self[np.isin(self.classes, [known.index(name) for name in names])]

    # ---- using

    def draw(self, path: str | os.PathLike[str] | None = None, *, scale: float | None = None) -> Image.Image:
        """The image with boxes, masks, keypoints, names and scores on it; a notebook shows it.

        Args:
            path: also written there, in the format of its suffix.
            scale: size of the picture, as a factor; default: 1, or what brings the longer side to 640 pixels.

        Returns:
            A picture of Pillow's, RGB. For OpenCV: ``numpy.asarray(picture)[:, :, ::-1]``.

        Raises:
            MissingLibraryError: OpenCV isn't installed.
            UserError: the file can't be written.
        """
        from zenith_det.report.pictures import draw_instances

        drawn = draw_instances(
            self.image,
            self.boxes,
            self.classes,
            self.scores,
            self.masks,
            self.keypoints,
            self.metadata,
            scale=scale,
        )
        picture = Image.fromarray(drawn[:, :, ::-1])
        if path is not None:
            save_picture(picture, path)
        return picture

    def crops(self) -> list[npt.NDArray[np.uint8]]:
        """The part of the image within each box, BGR uint8; whole pixels, at least one."""
        pixels = self.image
        height, width = self.size
        cut = []
        for x0, y0, x1, y1 in self.boxes:
            left, top = min(max(int(x0), 0), width - 1), min(max(int(y0), 0), height - 1)
            right, bottom = max(int(np.ceil(x1)), left + 1), max(int(np.ceil(y1)), top + 1)
            cut.append(pixels[top:bottom, left:right].copy())
        return cut

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """The objects in COCO's result format, plain numbers and text, for JSON.

        ``bbox`` is x, y, width, height; ``category_id`` is the training file's own (from 0 where the checkpoint doesn't
        tell them); ``segmentation`` is compressed RLE; ``keypoints`` are x, y, score in a row, without the half pixel
        that this toolkit adds to COCO's.

        Args:
            image_id: of the image in the annotation file that the results are for.
        """
        own = self.metadata.contiguous_id_to_thing_dataset_id
        results = detections_to_results(
            image_id,
            self.boxes,
            self.scores,
            self.classes,
            [own[index] for index in range(self.metadata.num_classes)],
            keypoints=self.keypoints,
        )
        for result, rle in zip(results, self._run_lengths() or ()):
            result["segmentation"] = rle
        return results

    def to_supervision(self) -> Any:
        """A ``supervision.Detections``: boxes, masks, scores, classes, and in its ``data`` ``class_name``.

        See :meth:`to_supervision_keypoints` for a model with keypoints, which supervision has by themselves.

        Raises:
            MissingLibraryError: supervision isn't installed.
        """
        return _supervision().Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.classes,
            data={"class_name": np.array(self.class_names, dtype=str)},
        )

    def to_supervision_keypoints(self) -> Any:
        """A ``supervision.KeyPoints``, its objects those of :meth:`to_supervision`, in the same order.

        Each keypoint's confidence is its score; ``data`` holds ``class_name``, and versions that have a
        ``detection_confidence`` the objects' scores there.

        Raises:
            MissingLibraryError: supervision isn't installed.
            UserError: the model has no keypoints.
        """
        supervision = _supervision()
        if self.keypoints is None:
            raise UserError("the model finds no keypoints: to_supervision gives its boxes and masks")
        if not len(self):
            return supervision.KeyPoints.empty()
        names = inspect.signature(supervision.KeyPoints).parameters
        more = {"detection_confidence": self.scores} if "detection_confidence" in names else {}
        # By position: the third has changed its name.
        return supervision.KeyPoints(
            self.keypoints[..., :2],
            self.classes,
            self.keypoints[..., 2],
            data={"class_name": np.array(self.class_names, dtype=str)},
            **more,
        )

    def compact(self) -> Prediction:
        """The same in little memory: masks as run lengths, and without the pixels of an image that has a file."""
        again = self.path is not None and self.frame is None
        return replace(self, _masks=self._run_lengths(), _pixels=None if again else self._pixels)

    def _run_lengths(self) -> Sequence[dict[str, Any]] | None:
        return encode_masks(self._masks) if isinstance(self._masks, np.ndarray) else self._masks


def _supervision() -> Any:
    try:
        return importlib.import_module("supervision")
    except ImportError as error:
        raise MissingLibraryError(
            f"supervision can't be imported ({error}): pip install supervision"
        ) from error


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture, whole or not at all, in the format of the name's suffix.

    Raises:
        UserError: it can't be written.
    """
    target, content = Path(path), io.BytesIO()
    Image.init()
    kind = Image.EXTENSION.get(target.suffix.lower())
    if kind is None:
        raise UserError(f"{target}: a picture's name must end in .png, .jpg or another format of Pillow's")
    picture.save(content, kind)
    return write_whole(target, content.getvalue())


def _is_empty_list(index: Any) -> bool:
    return isinstance(index, list | tuple) and not len(index)
