"""ZENITH's learning rate under AdamW's update."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._adamw import adamw_
from ._sgd import Scalars
from .zenith import ZENITH, Batch, is_real, require

__all__ = ["ZENITHAdamW"]


class ZENITHAdamW(ZENITH):
    r"""AdamW with the learning rate (LR) set by how the gradient norm has evolved, as in :class:`ZENITH`.

    **Not in the paper**, whose subject is SGD: the same ratio :math:`r_t` of norms, times the LR of AdamW
    (Loshchilov and Hutter, arXiv 1711.05101), weight decay included:

    .. math::
        \begin{aligned}
            \eta_t   &= \eta^{\text{sched}}_t \cdot r_t                                              \\
            a_t      &= \beta_1 a_{t-1} + (1 - \beta_1)\, g_t, \quad
            v_t       = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2                                       \\
            \theta_t &= (1 - \eta_t \lambda)\, \theta_{t-1} - \eta_t\,
                        \frac{a_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}
        \end{aligned}

    AdamW's steps don't depend on the scale of the gradient, so that here the ratio alone carries the norm's history
    into the update. Everything that :class:`ZENITH` says of norms, clipping, skipped steps, AMP, distributed
    training, ``torch.compile``, saving and logging holds, but for the state: per parameter ``exp_avg``,
    ``exp_avg_sq`` and ``step``, as ``torch.optim.AdamW`` has them. Either loads the other's state.

    Args:
        params, window, min_ratio, record_after, max_norm, clip, max_nonfinite_steps, fused, maximize: as for
            :class:`ZENITH`; groups may set their own ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``maximize`` and ``fused``.
        lr: :math:`\eta_0`, >= 0; a float or a 1-element tensor. AdamW's, so some 20 to 50 times smaller than SGD's.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, >= 0.
        weight_decay: :math:`\lambda`, >= 0, decoupled.
        norm_source: ``"gradient"``, or ``"momentum"`` for the norm of :math:`a_{t-1}`.

    Raises:
        ValueError: an argument is out of its range; it is named with its value and range.
    """

    _buffers = ("exp_avg", "exp_avg_sq")
    _not_taken = ("amsgrad",)

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool | None = None,
        maximize: bool = False,
        **of_zenith: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "fused": fused,
        }
        self._set_up(params, defaults, **of_zenith)

    def _check_momentum(self, group: dict[str, Any]) -> None:
        betas, eps = group["betas"], group["eps"]
        pair = isinstance(betas, list | tuple) and len(betas) == 2
        require(
            pair and all(is_real(b) and 0 <= b < 1 for b in betas), "betas", betas, "two numbers in [0, 1)"
        )
        require(is_real(eps) and 0 <= eps < math.inf, "eps", eps, "in [0, inf)")

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        return True

    def _update(self, group: dict[str, Any], batch: Batch, scalars: Scalars, *, fused: bool) -> None:
        states = [self._whole_state(param) for param in batch.params]
        adamw_(
            batch.params,
            batch.grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            scalars,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            fused=fused,
        )

    def _whole_state(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`ZENITH.load_state_dict`."""
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            if "step" in state:  # torch leaves it where it was saved unless the group says "fused"
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device)
