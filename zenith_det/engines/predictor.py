"""A trained model on single images."""

from __future__ import annotations

import numpy as np
import torch

from zenith_det.config import LoadedConfig
from zenith_det.data import DatasetMetadata
from zenith_det.engines.checkpoint_classes import classes_to_predict
from zenith_det.engines.device import resolve_device
from zenith_det.engines.engine import load_engine
from zenith_det.report.pictures import Instances


class Predictor:
    """Detects objects in images, with the model and the classes of a checkpoint.

    Args:
        engine_name: see :func:`~zenith_det.engines.engine.load_engine`.
        loaded: a run's ``config.yaml``, with ``MODEL.WEIGHTS`` naming a checkpoint of that run.

    Attributes:
        metadata: classes and keypoints, as the checkpoint remembers them.

    Raises:
        ConfigError: no weights, or a key that this engine can't honour.
        CheckpointError: weights without class names, or of another model.
    """

    def __init__(self, engine_name: str, loaded: LoadedConfig) -> None:
        cfg = loaded.cfg
        self.engine = load_engine(engine_name)
        resolve_device(loaded)
        self.engine.prepare(loaded)
        self.metadata: DatasetMetadata = classes_to_predict(loaded)
        self.model = self.engine.build_model(cfg)
        self.engine.load_weights(cfg, self.model, require_all=True)
        self.model.eval()
        self.bgr = cfg.INPUT.FORMAT == "BGR"
        self.mapper = self.engine.image_mapper(cfg)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Detections in one image, best first.

        Args:
            image: BGR uint8 ``(H, W, 3)``, as OpenCV reads it.
        """
        pixels = image if self.bgr else np.ascontiguousarray(image[..., ::-1])
        found = self.engine.detections(self.model([self.mapper(pixels)])[0])
        return Instances(
            boxes=found["boxes"],
            classes=found["classes"],
            scores=found["scores"],
            masks=found.get("masks"),
            keypoints=found.get("keypoints"),
        )
