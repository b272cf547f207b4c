"""A model trained on Detectron2, on single images."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.data import transforms as T

from zenith_det.config import LoadedConfig
from zenith_det.data import DatasetMetadata
from zenith_det.engines.checkpoint_classes import classes_to_predict
from zenith_det.engines.detectron2_engine.checkpoint import SafeCheckpointer
from zenith_det.engines.detectron2_engine.config import to_detectron2
from zenith_det.engines.detectron2_engine.data import AtLeastAPixel
from zenith_det.engines.detectron2_engine.trainer import ZenithTrainer
from zenith_det.engines.device import resolve_device
from zenith_det.report.pictures import Instances


class Predictor:
    """Detects objects in images; the counterpart of the built-in engine's ``Predictor``.

    Args:
        loaded: a run's ``config.yaml``, with ``MODEL.WEIGHTS`` naming a checkpoint of that run.

    Attributes:
        metadata: classes and keypoints, as the checkpoint remembers them.

    Raises:
        ConfigError: no weights.
        CheckpointError: weights without class names, or of another model.
    """

    def __init__(self, loaded: LoadedConfig) -> None:
        resolve_device(loaded)
        self.metadata: DatasetMetadata = classes_to_predict(loaded)
        cfg = to_detectron2(loaded)
        self.model = ZenithTrainer.build_model(cfg)
        SafeCheckpointer(self.model, "", require_all=True).load(cfg.MODEL.WEIGHTS)
        self.model.eval()
        self.resize = AtLeastAPixel(
            T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST)
        )
        self.image_format = cfg.INPUT.FORMAT

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Detections in one image, best first.

        Args:
            image: BGR uint8 ``(H, W, 3)``, as OpenCV reads it.
        """
        height, width = image.shape[:2]
        pixels = image if self.image_format == "BGR" else np.ascontiguousarray(image[..., ::-1])
        resized = self.resize.get_transform(pixels).apply_image(pixels)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        found = self.model([{"image": tensor, "height": height, "width": width}])[0]["instances"].to("cpu")
        return Instances(
            boxes=found.pred_boxes.tensor.numpy(),
            classes=found.pred_classes.numpy(),
            scores=found.scores.numpy(),
            masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
            keypoints=found.pred_keypoints.numpy() if found.has("pred_keypoints") else None,
        )
