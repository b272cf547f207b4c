"""Detectron2's ``VIS_PERIOD``: pictures of what the model proposes and which masks it predicts, for TensorBoard.

The names are those that Detectron2's models give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, make_grid

from zenith_det.config import CfgNode
from zenith_det.data.pixel_formats import to_rgb
from zenith_det.training.logs.events import EventStorage
from zenith_det.training.processes.distributed import is_main_process

PROPOSALS = "Left: GT bounding boxes;  Right: Predicted proposals"
MASKS = "Left: mask prediction;   Right: mask GT"
MOST_PROPOSALS, MOST_MASKS = 20, 64

_storage: ContextVar[EventStorage | None] = ContextVar("storage", default=None)


@contextmanager
def recording(storage: EventStorage) -> Iterator[None]:
    """Pictures go into ``storage`` meanwhile; outside of it none are made."""
    token = _storage.set(storage)
    try:
        yield
    finally:
        _storage.reset(token)


class TrainingPictures:
    """Puts pictures of training, every ``VIS_PERIOD`` iterations, where the run's scalars go.

    Args:
        cfg: with ``VIS_PERIOD`` (0: none are made) and ``INPUT.FORMAT``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._period: int = cfg.VIS_PERIOD
        self._format: str = cfg.INPUT.FORMAT

    def proposals(
        self, images: Sequence[Tensor], truth: Sequence[Tensor], proposed: Sequence[Tensor]
    ) -> None:
        """The first image of a batch with its boxes, and beside it with the best proposals.

        Args:
            images: ``(C, H, W)`` in ``INPUT.FORMAT``.
            truth, proposed: xyxy ``(N, 4)``; proposals best first.
        """
        if (storage := self._due()) is None:
            return
        rgb = to_rgb(images[0].permute(1, 2, 0).cpu().numpy(), self._format)
        image = torch.from_numpy(rgb).permute(2, 0, 1)
        pair = [_with_boxes(image, boxes) for boxes in (truth[0], proposed[0][:MOST_PROPOSALS])]
        storage.images.append((PROPOSALS, torch.cat(pair, dim=2), storage.iter))

    def masks(self, logits: Tensor, truth: Tensor) -> None:
        """Masks in their boxes, predicted and true side by side, all in one picture; both ``(N, M, M)``."""
        if (storage := self._due()) is None:
            return
        pairs = torch.cat((logits.detach().float().sigmoid(), truth.float()), dim=2)[:MOST_MASKS, None]
        storage.images.append((MASKS, make_grid(pairs.cpu(), pad_value=0.5), storage.iter))

    def _due(self) -> EventStorage | None:
        # Validation losses are computed without gradients, in between: those images are not trained on.
        storage = _storage.get()
        if storage is None or self._period <= 0 or not torch.is_grad_enabled() or not is_main_process():
            return None
        return storage if storage.iter % self._period == 0 else None


def _with_boxes(image: Tensor, boxes: Tensor) -> Tensor:
    height, width = image.shape[1:]
    # A box that is drawn must have a left and a right, in whole pixels.
    limit = torch.tensor([width - 1, height - 1] * 2)
    corners = boxes.detach().float().cpu().nan_to_num().clamp(min=0).minimum(limit)
    drawable = corners[(corners[:, 2:] > corners[:, :2]).all(dim=1)]
    return draw_bounding_boxes(image, drawable, width=2) if len(drawable) else image
