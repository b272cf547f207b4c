"""A trained model on images, folders and videos."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from zenith_det.data.pixel_formats import from_rgb
from zenith_det.engines.device import resolve_device
from zenith_det.engines.engine import Sample, load_engine
from zenith_det.errors import ConfigError
from zenith_det.predicting.image_sources import (
    ByteImage,
    OnBadImage,
    OneImage,
    Picture,
    check_file,
    collect,
    is_video,
    read_all,
    read_one,
)
from zenith_det.predicting.prediction import Prediction
from zenith_det.predicting.trained_model import find_trained_model

__all__ = ["Predictor"]

_THRESHOLD_KEYS = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}


class Predictor:
    """Detects objects with a trained model::

        predictor = Predictor("output/mine")
        found = predictor("photo.jpg")
        found.boxes, found.scores, found.class_names

    Args:
        run: ``OUTPUT_DIR`` of a run: its averaged weights where there are any, else the trained ones, else its newest
            checkpoint. Or a checkpoint of this toolkit (``.pth``) alone, which holds its classes and configuration.
            Or a config, by path or name, with ``weights``.
        weights: in place of the run's: a file of this toolkit, of Detectron2 or of torchvision, or an address.
        threshold: the lowest score that is kept. ``None``: what the model keeps, ``MODEL.ROI_HEADS.SCORE_THRESH_TEST``
            (0.05 unless the config says otherwise), which a lower threshold lowers.
        engine: "torchvision", "detectron2", or "auto": the one that trained the weights, where it can be used here.
        device: "cpu", "cuda", "cuda:1", or "auto": a GPU if there is one.
        batch_size: images that the model takes at once, at most. Only neighbours of one size after resizing are taken
            together, so that nothing is padded and a result doesn't depend on the other images.
        class_names: for weights that don't say which classes they are for.
        opts: configuration over the run's own: ``["INPUT.MIN_SIZE_TEST", 1200]``.

    Attributes:
        metadata: names of classes and keypoints, category ids, the skeleton (:class:`DatasetMetadata`).
        cfg: the configuration.
        model: the engine's, a ``torch.nn.Module`` in evaluation mode.
        mapper: makes what the model takes of an image's pixels, in ``INPUT.FORMAT``.

    Raises:
        ConfigError: no such run or config, no weights, or a key that the engine can't honour.
        CheckpointError: weights that can't be read, without class names, or of another model.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        weights: str | os.PathLike[str] | None = None,
        *,
        threshold: float | None = 0.5,
        engine: str = "auto",
        device: str = "auto",
        batch_size: int = 4,
        class_names: Sequence[str] | None = None,
        opts: Sequence[Any] = (),
    ) -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(f"threshold is {threshold!r}: it must lie between 0 and 1")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}: it must be 1 or more")
        found = find_trained_model(
            run, weights, engine=engine, device=device, class_names=class_names, opts=opts
        )
        self.cfg = found.loaded.cfg
        self.metadata = found.metadata
        self.threshold = threshold
        self.batch_size = batch_size
        section = _THRESHOLD_KEYS.get(self.cfg.MODEL.META_ARCHITECTURE)
        if section and threshold is not None and threshold < self.cfg.MODEL[section].SCORE_THRESH_TEST:
            found.loaded.override(f"MODEL.{section}.SCORE_THRESH_TEST", float(threshold), "threshold")
        self._engine = load_engine(found.engine)
        resolve_device(found.loaded)
        self._engine.prepare(found.loaded)
        self.model = self._engine.build_model(self.cfg)
        self._engine.load_weights(self.cfg, self.model, require_all=True)
        self.model.eval()
        self.mapper = self._engine.image_mapper(self.cfg)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # an array is iterable, too
        self, source: ByteImage | Image.Image
    ) -> Prediction: ...
    @overload
    def __call__(self, source: list[Any] | tuple[Any, ...]) -> list[Prediction]: ...
    @overload
    def __call__(self, source: str | os.PathLike[str]) -> Any: ...
    @overload
    def __call__(self, source: Iterable[OneImage]) -> Iterator[Prediction]: ...

    def __call__(self, source: Any) -> Any:
        """Detect objects.

        Args:
            source: an image: a file, an array uint8 ``(H, W, 3)`` in BGR order as OpenCV reads it, or a picture of
                Pillow's. Or a list of images. Or what may be of any length: a folder of images and videos with its
                subfolders, a video, any other iterable of images.

        Returns:
            Of an image, a :class:`Prediction`. Of a list, a list of them, which hold their masks compressed. Otherwise
            an iterator, which reads ahead by ``batch_size`` images at most: see :meth:`stream`.

        Raises:
            ImageError: a file that can't be read.
            UserError: what is neither.
        """
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            if path.is_dir() or is_video(path):
                return self.stream(path)
            check_file(path)
        elif isinstance(source, list | tuple):
            return [
                one.compact()
                for one in self._detect(
                    read_all(source, videos=False, value_range=self.cfg.INPUT.VALUE_RANGE)
                )
            ]
        elif isinstance(source, Iterable) and not isinstance(source, np.ndarray | torch.Tensor):
            return self.stream(source)
        return next(self._detect(iter([read_one(source, self.cfg.INPUT.VALUE_RANGE)])))

    def stream(
        self,
        source: str | os.PathLike[str] | Iterable[OneImage],
        on_bad_image: OnBadImage | None = None,
    ) -> Iterator[Prediction]:
        """Predictions one after the other, in the order of the images, in bounded memory.

        Args:
            source: a folder, searched with its subfolders; a video; or an iterable of images and videos.
            on_bad_image: called with an :class:`ImageError` (``path``, ``reason``) for each file that can't be read,
                which is then passed over.

        Raises:
            ImageError: a file that can't be read, without ``on_bad_image``. An iterator that has raised is at its end.
            UserError: no such file or folder, or nothing to detect in.
        """
        sources: Iterable[Any]
        if isinstance(source, str | os.PathLike):
            sources = [path for path, _ in collect([Path(source)])]
        else:
            sources = source
        return self._detect(read_all(sources, on_bad_image, value_range=self.cfg.INPUT.VALUE_RANGE))

    def _detect(self, pictures: Iterator[Picture]) -> Iterator[Prediction]:
        waiting: list[tuple[Picture, Sample]] = []
        for picture in pictures:
            sample = self.mapper(from_rgb(picture.pixels[..., ::-1], self.cfg.INPUT.FORMAT))
            full = len(waiting) == self.batch_size
            if waiting and (full or waiting[0][1]["image"].shape != sample["image"].shape):
                yield from self._predictions(waiting)
                waiting = []
            waiting.append((picture, sample))
        if waiting:
            yield from self._predictions(waiting)

    def _predictions(self, batch: Sequence[tuple[Picture, Sample]]) -> list[Prediction]:
        device = self.cfg.MODEL.DEVICE.split(":")[0]
        # In float32, as evaluation is.
        with torch.inference_mode(), torch.autocast(device, enabled=False):
            outputs = self.model([sample for _, sample in batch])
        return [self._prediction(picture, output) for (picture, _), output in zip(batch, outputs)]

    def _prediction(self, picture: Picture, output: Any) -> Prediction:
        found = self._engine.detections(output)
        if self.threshold is not None:
            kept = found["scores"] >= self.threshold
            found = {name: values[kept] for name, values in found.items()}
        keypoints = found.get("keypoints")
        return Prediction(
            boxes=found["boxes"].astype(np.float32, copy=False),
            scores=found["scores"].astype(np.float32, copy=False),
            classes=found["classes"].astype(np.int64, copy=False),
            metadata=self.metadata,
            size=picture.pixels.shape[:2],
            keypoints=None if keypoints is None else keypoints.astype(np.float32, copy=False),
            path=picture.path,
            frame=picture.frame,
            _masks=found.get("masks"),
            _pixels=picture.pixels,
            _value_range=tuple(self.cfg.INPUT.VALUE_RANGE),
        )
