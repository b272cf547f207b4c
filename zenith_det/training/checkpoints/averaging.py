"""Averaged weights beside the trained ones: what is evaluated and kept, without any decay of the LR.

A step schedule or a cosine anneals the noise of SGD away at the end of a run whose length it has to know.
Averaging the weights along the way does the same for a run of any length (Polyak and Juditsky, 1992; Izmailov
et al., arXiv 1803.05407), under any optimizer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.checkpoint import FINAL_NAME

logger = logging.getLogger(__name__)

KINDS = ("", "ema", "tail")
#: What scalars of the averaged weights' evaluation are logged under: ``averaged/bbox/AP``.
PREFIX = "averaged/"
#: Where that evaluation leaves its files, in the output directory.
FOLDER = "averaged"
#: Added to the name of the final checkpoint for the file that holds the averaged weights.
SUFFIX = "_averaged"
#: What a run that has ended leaves: its trained weights, and beside them the averaged ones.
TRAINED_FILE, AVERAGED_FILE = f"{FINAL_NAME}.pth", f"{FINAL_NAME}{SUFFIX}.pth"
_KEPT_FACTS = ("dataset", "engine", "config", "iteration", "best")


def result_file(cfg: Any) -> str:
    """The name of the weights to use of a run with this configuration."""
    return AVERAGED_FILE if cfg.SOLVER.AVERAGE.KIND else TRAINED_FILE


def is_averaged(file: str) -> bool:
    """Whether a file, by its name, holds averaged weights."""
    return Path(file).stem.endswith(SUFFIX)


class WeightAverage:
    """A running average of everything in a model that training changes. One more copy of the weights.

    * ``"ema"``: exponential, ``a += (1 - d) (w - a)``. So that a short run isn't an average with its own
      start, ``d`` grows to ``decay`` as ``(1 + t) / (10 + t)`` does.
    * ``"tail"``: over about the newest share ``tail`` of the steps so far, however many these are: weights
      in proportion to ``t^g`` with ``g = 2 / tail - 2`` (polynomial-decay averaging, Shamir and Zhang, arXiv
      1212.1824), whose mean age is that of the plain average over that share.

    Floating-point buffers, the running statistics of BatchNorm among them, are averaged like the weights:
    each step's are those of its own weights. Other buffers are copied.

    ``torch.optim.swa_utils.AveragedModel`` isn't used as it copies the module with its hooks and reads its
    counter back from the device at each update.

    Args:
        model: not wrapped by DDP. The average starts from its weights as they are.
        kind: ``"ema"`` or ``"tail"``.
        decay: of ``"ema"``, in [0, 1).
        tail: of ``"tail"``, in (0, 1].
    """

    def __init__(self, model: nn.Module, kind: str, *, decay: float = 0.999, tail: float = 0.1) -> None:
        if kind not in KINDS[1:]:
            raise ValueError(f"kind is {kind!r}: 'ema' or 'tail'")
        self.model = model
        self.kind = kind
        self.decay = decay
        self.tail = tail
        self.updates = 0
        self._live = _live_tensors(model)
        self._averages = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @classmethod
    def of(cls, cfg: Any, model: nn.Module) -> WeightAverage | None:
        """The average that ``SOLVER.AVERAGE`` asks for."""
        settings = cfg.SOLVER.AVERAGE
        if not settings.KIND:
            return None
        return cls(model, settings.KIND, decay=settings.DECAY, tail=settings.TAIL)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.updates += 1
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for name, average in self._averages.items():
            if average.is_floating_point():
                averages.append(average)
                values.append(self._live[name])
            else:
                average.copy_(self._live[name])
        torch._foreach_lerp_(averages, values, self._weight())

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the model's weights as they are."""
        self.updates = 0
        for name, average in self._averages.items():
            average.copy_(self._live[name])

    def _weight(self) -> float:
        """What the newest weights count."""
        t = self.updates
        if self.kind == "ema":
            return 1 - min(self.decay, (1 + t) / (10 + t))
        power = 2 / self.tail - 2
        return (power + 1) / (t + power)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside; afterwards its own again, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # By value, one tensor at a time: optimizer, DDP and compiled code know the tensors by address.
        for name, average in self._averages.items():
            kept = self._live[name].clone()
            self._live[name].copy_(average)
            average.copy_(kept)

    def checkpoint(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint with the averages for weights: to use them, not to resume from.

        Args:
            facts: of the run; those that tell what the model is are kept.
        """
        state: dict[str, Any] = self.model.state_dict(keep_vars=True)
        # By tensor and not by name: a shared one has two names there, and one average here.
        averages = {id(self._live[name]): average for name, average in self._averages.items()}
        model = {name: averages.get(id(value), value) for name, value in state.items()}
        return {"model": model} | {name: facts[name] for name in _KEPT_FACTS if name in facts}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the averages and how many steps they hold."""
        return {"kind": self.kind, "updates": self.updates, "tensors": dict(self._averages)}

    def resume(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Go on with a checkpoint's average; the kind and its settings are the present ones.

        Args:
            checkpoint: the whole of it; the model has its weights already. One without an average, of a run
                that had none, starts one, with a line that says so.
            source: the file, for messages.

        Raises:
            CheckpointError: its average is of another model.
        """
        self.restart()  # also what has been unfrozen since
        if "average" not in checkpoint:
            logger.warning("%s holds no averaged weights: they start from its weights", source)
            return
        saved = checkpoint["average"]["tensors"]
        for name, average in self._averages.items():
            if name in saved and saved[name].shape != average.shape:
                raise CheckpointError(
                    f"{source}: the averaged {name} has shape {list(saved[name].shape)}, the model's "
                    f"{list(average.shape)}: it is of another model"
                )
            average.copy_(saved.get(name, average))
        self.updates = int(checkpoint["average"]["updates"])


def _live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes and a checkpoint holds, by its name there; shared tensors once."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = model.state_dict(keep_vars=True)
    buffers = {name: b for name, b in model.named_buffers() if name in saved}
    return trained | buffers
