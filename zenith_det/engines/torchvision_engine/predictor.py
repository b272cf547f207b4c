"""A trained model on single images."""

from __future__ import annotations

import numpy as np
import torch

from zenith_det.config import LoadedConfig
from zenith_det.data import DatasetMetadata
from zenith_det.engines.checkpoint_classes import classes_to_predict
from zenith_det.engines.device import resolve_device
from zenith_det.engines.torchvision_engine.input_pipeline import TestMapper
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.engines.torchvision_engine.support import check_supported
from zenith_det.engines.torchvision_engine.weights import load_weights
from zenith_det.report.pictures import Instances


class Predictor:
    """Detects objects in images, with the model and the classes of a checkpoint.

    Args:
        loaded: a run's ``config.yaml``, with ``MODEL.WEIGHTS`` naming a checkpoint of that run.

    Attributes:
        metadata: classes and keypoints, as the checkpoint remembers them.

    Raises:
        ConfigError: no weights, or a key that this engine can't honour.
        CheckpointError: weights without class names, or of another model.
    """

    def __init__(self, loaded: LoadedConfig) -> None:
        cfg = loaded.cfg
        resolve_device(loaded)
        check_supported(loaded)
        self.metadata: DatasetMetadata = classes_to_predict(loaded)
        self.model = build_model(cfg)
        load_weights(cfg, self.model, require_all=True)
        self.model.eval()
        self.mapper = TestMapper(cfg)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Detections in one image, best first.

        Args:
            image: BGR uint8 ``(H, W, 3)``, as OpenCV reads it.
        """
        pixels = image if self.mapper.image_format == "BGR" else np.ascontiguousarray(image[..., ::-1])
        found = {k: v.cpu().numpy() for k, v in self.model([self.mapper.from_image(pixels)])[0].items()}
        return Instances(
            boxes=found["boxes"],
            classes=found["classes"],
            scores=found["scores"],
            masks=found.get("masks"),
            keypoints=found.get("keypoints"),
        )
