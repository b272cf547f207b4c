"""ZENITH's learning rate under AdamW's update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._base import Batch, ZenithOptimizer
from ._checks import is_real, require
from ._norm import by_device_and_dtype, is_dtensor
from ._update import Scalars, fused_supports, in_float32, local

__all__ = ["ZENITHAdamW"]


Lists = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


class ZENITHAdamW(ZenithOptimizer):
    r"""AdamW with the learning rate (LR) set by how the gradient norm has evolved, as in
    :class:`~zenith_det.optim.ZENITH`.

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
        params, window, min_ratio, record_after, half_life, max_norm, clip, max_nonfinite_steps, fused, maximize: as for
            :class:`ZENITH`; groups may set their own ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``maximize`` and ``fused``.
        lr: :math:`\eta_0`, >= 0; a float or a 1-element tensor. AdamW's, so some 20 to 50 times smaller than SGD's.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1): a tuple, a list, an array, a node of a config.
        eps: :math:`\epsilon`, >= 0.
        weight_decay: :math:`\lambda`, >= 0, decoupled.
        norm_source: ``"gradient"``, or ``"momentum"`` for the norm of :math:`a_{t-1}`.

    Raises:
        ValueError: an argument is out of its range; it is named with its value and range.
    """

    _buffers = ("exp_avg", "exp_avg_sq")
    _absent: ClassVar[dict[str, Any]] = {
        "amsgrad": False,
        "decoupled_weight_decay": True,
        "differentiable": False,
        "momentum": 0.0,
        "nesterov": False,
        "dampening": 0.0,
    }

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: Iterable[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        window: int = 100,
        min_ratio: float = 0.0,
        record_after: int = 0,
        half_life: int = 0,
        norm_source: str = "gradient",
        max_norm: float | None = None,
        clip: Callable[[list[Tensor]], object] | None = None,
        max_nonfinite_steps: int = 50,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": _numbers(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "fused": fused,
            },
            window=window,
            min_ratio=min_ratio,
            record_after=record_after,
            half_life=half_life,
            norm_source=norm_source,
            max_norm=max_norm,
            clip=clip,
            max_nonfinite_steps=max_nonfinite_steps,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`ZENITH.add_param_group`."""
        if isinstance(param_group, dict) and "betas" in param_group:
            param_group["betas"] = _numbers(param_group["betas"])
        super().add_param_group(param_group)

    def _check_momentum(self, group: dict[str, Any]) -> None:
        betas, eps = group["betas"], group["eps"]
        pair = isinstance(betas, list | tuple) and len(betas) == 2
        require(
            pair and all(is_real(b) and 0 <= b < 1 for b in betas), "betas", betas, "two numbers in [0, 1)"
        )
        require(is_real(eps) and 0 <= eps < math.inf, "eps", eps, "in [0, inf)")

    def _check_absent(self, group: dict[str, Any]) -> None:
        if group.get("weight_decay") == 0:  # Adam then does what AdamW does
            group = {name: value for name, value in group.items() if name != "decoupled_weight_decay"}
        super()._check_absent(group)

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

    def _check_state(self, param: Tensor, state: dict[str, Any], index: int) -> None:
        super()._check_state(param, state, index)
        if "step" in state:  # torch leaves it where it was saved unless the group says "fused"
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device)


def _numbers(values: Any) -> Any:
    """A tuple of numbers: LazyConfig's lists and NumPy's arrays are neither lists nor tuples."""
    try:
        values = tuple(values)
    except TypeError:
        return values
    return tuple(value.item() if hasattr(value, "item") else value for value in values)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    scalars: Scalars,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    fused: bool,
) -> None:
    """One step of AdamW on ``params`` in place: ``torch.optim.AdamW`` with tensors for the learning rate and the
    rest.

    Args:
        params: parameters; devices and types may be mixed.
        grads: their gradients, strided. The fused kernel leaves them divided by ``grad_scale``.
        exp_avgs, exp_avg_sqs: their running means and mean squares, zeros before the first step.
        steps: how many updates each has had, 0-dim float32 on the parameter's device.
        scalars: learning rate, whether to skip, gradient scale.
        betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        fused: use torch's fused kernel wherever it can; else (and for the rest) tensor by tensor.
    """
    lists: Lists = (params, grads, exp_avgs, exp_avg_sqs, steps)
    if any(type(grad) is not Tensor and is_dtensor(grad) for grad in grads):
        lists = (*zip(*map(local, *lists[:4])), steps)  # type: ignore[assignment]
    if any(param.is_complex() for param in params):
        parts = [[torch.view_as_real(t) if t.is_complex() else t for t in one] for one in lists]
        lists = tuple(parts)  # type: ignore[assignment]
    able = [fused and _fused_supports(*one[:4]) for one in zip(*lists)]
    if any(able):
        _fused_adamw_(_only(able, lists), scalars, betas, eps, weight_decay, maximize)
    for one in zip(*_only([not yes for yes in able], lists)):
        _single_tensor_adamw_(*one, scalars.to(one[0].device), betas, eps, weight_decay, maximize)


def _single_tensor_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    scalars: Scalars,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    r"""The definition, for one parameter, in operations that every device and type has; in float32 or better.

    ``scalars.lr`` is :math:`\eta_t`: the group's LR times the ratio, which ``NormHistory.update()`` makes of the norms.
    """
    skip = scalars.skip.bool()
    old, g = in_float32(param, grad, scalars, maximize)
    dtype = old.dtype
    mean = betas[0] * exp_avg.to(dtype) + (1 - betas[0]) * g
    square = betas[1] * exp_avg_sq.to(dtype) + (1 - betas[1]) * g * g
    step.add_(1 - scalars.skip)
    taken = step.to(scalars.lr.dtype)
    step_size = scalars.lr / (1 - betas[0] ** taken)
    root = (square / (1 - betas[1] ** taken)).sqrt() + eps
    new = old * (1 - scalars.lr * weight_decay) - step_size * mean / root
    # Selected and not multiplied by 0: 0 times inf is NaN.
    exp_avg.copy_(torch.where(skip, exp_avg, mean))
    exp_avg_sq.copy_(torch.where(skip, exp_avg_sq, square))
    param.copy_(torch.where(skip, param, new))


def _fused_adamw_(
    lists: Lists,
    scalars: Scalars,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    for params, grads, exp_avgs, exp_avg_sqs, steps in by_device_and_dtype(*lists):
        device = params[0].device
        lr, skip, grad_scale = scalars.to(device)
        torch._foreach_add_(steps, [1 - skip] * len(steps))  # a list: torch would read a lone tensor
        torch._fused_adamw_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            # The CUDA kernel reads a float32; the CPU one any type.
            lr=lr if device.type == "cpu" else lr.float(),
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=maximize,
            grad_scale=grad_scale,
            found_inf=skip,
        )


def _only(wanted: list[bool], lists: Lists) -> Lists:
    if all(wanted):
        return lists
    return tuple(list(compress(one, wanted)) for one in lists)  # type: ignore[return-value]


def _fused_supports(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    return fused_supports(param, grad, exp_avg) and exp_avg_sq.stride() == exp_avg.stride()
