"""Detectron2's checkpointer, made safe to read from and to be interrupted in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from zenith_det import cli
from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.checkpoint import Checkpointer
from zenith_det.training.checkpoints.reading import load_checkpoint, read_pickle
from zenith_det.training.checkpoints.weights import LoadReport, locate_weights


class SafeCheckpointer(DetectionCheckpointer):
    """As ``DetectionCheckpointer``, but no file runs code, and a crash while saving costs no checkpoint.

    Files, their names and what they hold are Detectron2's; each loads under
    ``torch.load(weights_only=True)``. Model-zoo pickles are read by an unpickler that knows arrays alone.

    Args:
        allow_mismatch: leave out tensors of another shape, as Detectron2 does (with a warning); ``False``:
            they are an error.
        require_all: every tensor of the model must be in the file, as evaluation needs.

    Attributes:
        loaded: of the file loaded last: (tensors taken from it, tensors of the model).

    The other arguments are ``DetectionCheckpointer``'s.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        allow_mismatch: bool = True,
        require_all: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.loaded: tuple[int, int] | None = None
        self._allow_mismatch = allow_mismatch
        self._require_all = require_all
        self._last: str | None = None
        self._source = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, the checkpointables and ``kwargs`` as ``<name>.pth``, whole or not at all.

        Raises:
            CheckpointError: it cannot be written, or holds what no safe loading could read back.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = {"model": self.model.state_dict()}
        state.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        path = Checkpointer(self.save_dir).save(name, {**state, **kwargs}, mark_last=False)
        self.logger.info("Saved the checkpoint %s", path)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make it the one that a resumed run takes."""
        path = Path(self.save_dir, last_filename_basename)
        Checkpointer(self.save_dir).mark_last(path)
        self._last = str(path)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file, a ``detectron2://`` name or a URL; "" loads nothing.

        Raises:
            CheckpointError: missing, damaged, refused because reading it could run code, or not fetchable.
        """
        if path:
            name, _, query = path.partition("?")
            # All ranks fetch to the same place; the first one does it for its machine.
            if comm.get_local_rank() == 0:
                locate_weights(name)
            comm.synchronize()
            self._source = str(locate_weights(name))
            path = f"{self._source}?{query}" if query else self._source
        loaded: dict[str, Any] = super().load(path, *args, **kwargs)
        return loaded

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the newest whole checkpoint of ``save_dir``, else load the model from ``path``.

        To be called by all processes together.

        Raises:
            CheckpointError: there are checkpoints but none is whole, or ``path`` cannot be loaded.
        """
        if resume and self.save_dir and self._last is None:
            # A damaged file is renamed while looking: one process looks for all.
            found = Checkpointer(self.save_dir).last() if comm.is_main_process() else None
            self._last = str(comm.all_gather(found)[0] or "")
        loaded: dict[str, Any] = super().resume_or_load(path, resume=resume)
        return loaded

    def has_checkpoint(self) -> bool:
        return bool(self._last) if self._last is not None else super().has_checkpoint()

    def get_checkpoint_file(self) -> str:
        return self._last if self._last is not None else super().get_checkpoint_file()

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if checkpoint.get("engine") == "torchvision":
            raise CheckpointError(
                f"{self._source} is a checkpoint of the built-in engine: convert it with "
                f"{cli.command('convert-checkpoint')}, or take --engine torchvision"
            )
        incompatible = super()._load_model(checkpoint)
        mismatched = {name: (tuple(saved), tuple(own)) for name, saved, own in incompatible.incorrect_shapes}
        # Detectron2 tells of one that has another shape as of one that is missing, too.
        missing = tuple(name for name in incompatible.missing_keys if name not in mismatched)
        report = LoadReport(
            self._source,
            matched=tuple(name for name in self.model.state_dict() if name not in {*missing, *mismatched}),
            missing=missing,
            unexpected=tuple(incompatible.unexpected_keys),
            mismatched=mismatched,
        )
        report.check(require_all=self._require_all, allow_mismatch=self._allow_mismatch)
        self.loaded = (len(report.matched), report.total)
        self.logger.info(report.summary())
        return incompatible

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith((".pkl", ".pyth")):
            loaded: dict[str, Any] = super()._load_file(filename)
            return loaded
        if filename.endswith(".pyth"):  # pycls
            tensors = load_checkpoint(filename)["model_state"]
            kept = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
            return {"model": kept, "__author__": "pycls", "matching_heuristics": True}
        data = read_pickle(filename)
        if "model" in data and "__author__" in data:
            return data
        weights = data.get("blobs", data)  # Detectron1's detectors have "blobs", its backbones do not
        kept = {key: value for key, value in weights.items() if not key.endswith("_momentum")}
        return {"model": kept, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f: str) -> dict[str, Any]:
        return load_checkpoint(os.fspath(f))
