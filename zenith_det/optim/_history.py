"""What ZENITH remembers: the last W norms, their mean, its maximum, and the ratio of the two."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._norm import accumulate_dtype

__all__ = ["NormHistory"]

# Places in NormHistory.counts.
_RECORDED, _FINITE, _SKIPPED, _STREAK = range(4)


class NormHistory:
    """The window of norms m_t, the zenith M_t and the ratio r_t, kept on the device and never read by the
    host.

    Everything that changes is a tensor, updated by branch-free arithmetic: a Python ``if`` would have to wait
    for the device, and a Python counter would make ``torch.compile`` compile every step anew. Written in few
    operations: on a GPU each costs about the same, however small.

    Args:
        window: W, how many norms the mean is taken over, >= 1.
        min_ratio: r_min, the least ratio.
        record_after: how many finite steps pass before the first norm is recorded.
        half_life: in how many recorded steps the zenith halves where no mean reaches it; 0: it stays.

    Attributes:
        norms: (W,) the last W norms, oldest first; NaN where nothing has been recorded yet. NaN stands for
            "not full" in all that follows: a mean over it is NaN, and NaN never wins in ``fmax``. The mean is
            taken from these norms anew in every step, so it cannot drift.
        zenith: 0-dim, M_t, the largest mean of a full window so far; 0 before there was one.
        ratio: 0-dim, r_t, the ratio of the last step; 1 before the window was full.
        grad_norm: 0-dim, the gradient norm of the last step, finite or not.
        counts: (4,) int64: norms recorded, finite steps, steps skipped, steps skipped in a row up to now.
    """

    def __init__(self, window: int, min_ratio: float, record_after: int, half_life: int) -> None:
        self.window = window
        self.half_life = half_life
        self.min_ratio = min_ratio
        self.record_after = record_after
        self._create(torch.device("cpu"))

    def _create(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # tensors made in it couldn't be changed outside
            self.grad_norm = torch.zeros((), dtype=accumulate_dtype(device), device=device)
            self.counts = torch.zeros(4, dtype=torch.int64, device=device)
            # counts <- counts * keep + add, by whether the step was finite.
            self._if_finite = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]], device=device)
            self._if_not = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=device)
            self.reset()

    def reset(self) -> None:
        """Forgets the norms and the zenith: the ratio is 1 until the window is full again.

        The count of finite steps stays, so that ``record_after`` (a warm-up that is over) does not apply
        again.
        """
        dtype, device = self.grad_norm.dtype, self.device
        with torch.inference_mode(False):
            self.norms = torch.full((self.window,), math.nan, dtype=dtype, device=device)
            self.zenith = torch.zeros((), dtype=dtype, device=device)
            self.ratio = torch.ones((), dtype=dtype, device=device)
            self.counts[_RECORDED] = 0

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @property
    def streak(self) -> Tensor:
        """0-dim int64: how many steps up to now were skipped in a row."""
        return self.counts[_STREAK]

    def follow(self, norm: Tensor) -> None:
        """Goes where norms are: from the CPU, where it starts, to an accelerator; anew where it was on the meta device
        or fake, and they aren't."""
        here, there = self.counts, norm.device
        if (here.is_meta and not norm.is_meta) or (type(here) is not Tensor and type(norm) is Tensor):
            self._create(there)
        elif here.is_cpu and there.type != "cpu":
            self.to(there)

    def to(self, device: torch.device) -> None:
        """Moves the history to ``device``."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                dtype = accumulate_dtype(device) if value.is_floating_point() else None
                setattr(self, name, value.to(device, dtype))

    def update(self, norm: Tensor, record: Tensor, grad_norm: Tensor, finite: Tensor) -> Tensor:
        """One step: n_t in, r_t out.

        Args:
            norm: n_t, 0-dim, of the history's type and on its device.
            record: 0-dim bool, whether n_t joins the window (with ``record_after`` also satisfied).
            grad_norm: 0-dim, kept for logs; the same as ``norm`` unless that is taken of something else.
            finite: 0-dim bool, whether the step is taken.

        Returns:
            r_t, the attribute ``ratio``.
        """
        if self.record_after:
            record = record & (self.counts[_FINITE] >= self.record_after)
        shifted = torch.cat((self.norms[1:], norm.view(1)))
        torch.where(record, shifted, self.norms, out=self.norms)

        # A step that records nothing leaves the norms as they were, hence all that is computed from them.
        mean = self.norms.mean()
        zenith = self.zenith
        if self.half_life:
            zenith = torch.where(record & ~mean.isnan(), zenith * 0.5 ** (1 / self.half_life), zenith)
        torch.fmax(zenith, mean, out=self.zenith)
        ratio = mean / self.zenith
        if self.min_ratio:
            ratio = ratio.clamp_min(self.min_ratio)
        # NaN: the window is not full, or all norms were 0 (0/0). Then the ratio stays what it was: 1 in a new
        # run, the last one where a saved history was loaded into a longer window.
        torch.where(ratio.isnan(), self.ratio, ratio, out=self.ratio)

        keep, add = torch.where(finite, self._if_finite, self._if_not)
        torch.addcmul(add, self.counts, keep, out=self.counts)
        self.counts[_RECORDED].add_(record)
        self.grad_norm = grad_norm
        return self.ratio

    def read(self) -> dict[str, float | int]:
        """All of it as Python numbers, for logs. Waits for the device.

        ``window_mean`` is m_t, or while the window is not full the mean of what is there (0.0 if nothing is).
        """
        scalars = torch.stack((self.ratio, self.grad_norm, self.norms.nanmean(), self.zenith)).tolist()
        ratio, grad_norm, mean, zenith = scalars
        counts = self.counts.tolist()
        return {
            "ratio": ratio,
            "grad_norm": grad_norm,
            "window_mean": 0.0 if math.isnan(mean) else mean,
            "zenith": zenith,
            "skipped_steps": counts[_SKIPPED],
            "recorded_steps": counts[_RECORDED],
            "consecutive_nonfinite": counts[_STREAK],
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, by the names under "Attributes"."""
        return {name: getattr(self, name) for name in ("norms", "zenith", "ratio", "grad_norm", "counts")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a copy of ``state``; of another window's norms, the newest that fit."""
        state = {name: value.clone() for name, value in state.items()}  # it may be this history's own
        self.reset()
        norms = state["norms"]
        kept = min(self.window, len(norms))
        self.norms[self.window - kept :].copy_(norms[len(norms) - kept :])
        for name in ("zenith", "ratio", "grad_norm", "counts"):
            getattr(self, name).copy_(state[name])
