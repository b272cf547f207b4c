"""ZENITH: SGD whose learning rate follows the history of the gradient norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._base import Batch, ZenithOptimizer
from ._checks import is_real, require
from ._norm import by_device_and_dtype, is_dtensor
from ._update import Scalars, fused_supports, in_float32, local

__all__ = ["ZENITH"]


class ZENITH(ZenithOptimizer):
    r"""SGD with the learning rate (LR) set by how the gradient norm has evolved.

    Zero-overhead Evolution using Norm-Informed Training History (D. Saha, arXiv 2601.15212). With :math:`g_t`
    the gradient of all parameters of all groups together, as ``backward()`` left it, step :math:`t` is

    .. math::
        \begin{aligned}
            n_t      &= \lVert g_t \rVert_2                                                           \\
            m_t      &= \operatorname{mean}(n_{t-W+1}, \dots, n_t)                                    \\
            M_t      &= \max(2^{-1/h} M_{t-1}, m_t) \quad\text{(without } h \text{: } M_{t-1} \text{ as it is)} \\
            r_t      &= \operatorname{clamp}(m_t / M_t,\, r_{\min},\, 1) \quad\text{(1 before step W)} \\
            \eta_t   &= \eta^{\text{sched}}_t \cdot r_t                                               \\
            d_t      &= g_t + \lambda\, \theta_{t-1}                                                  \\
            b_t      &= \mu\, b_{t-1} + d_t                                                           \\
            \theta_t &= \theta_{t-1} - \eta_t\, b_t \quad\text{(nesterov: } d_t + \mu\, b_t \text{ for } b_t)
        \end{aligned}

    ========================== ================= =========================================================
    symbol                     argument          meaning
    ========================== ================= =========================================================
    :math:`\eta^{sched}`       ``lr``            the group's LR, yours or a scheduler's to change any time
    :math:`W`                  ``window``        how many norms the mean is taken over
    :math:`r_{\min}`           ``min_ratio``     least ratio
    :math:`h`                  ``half_life``     in how many steps the zenith halves; 0: it stays
    :math:`\mu`                ``momentum``      momentum factor
    :math:`\lambda`            ``weight_decay``  L2 penalty
    :math:`n_t`                ``norm_source``   what the norm is of; ``record_after`` leaves out the first
    ========================== ================= =========================================================

    Early in training the norm is large, and the LR is the full one. As the norm falls, so does the LR. There is no
    schedule, so the length of the training need not be known, and there is no ``train()``/``eval()`` mode to switch.

    **From the paper**: the queue of W norms, its mean, the maximum of the mean (the "zenith"), :math:`\eta_0`
    until the queue is full, their ratio times :math:`\eta_0` from then on; SGD without momentum
    (``momentum=0``).

    **Decided here**, where the paper leaves it open:

    * Norms are of the raw loss gradient: before weight decay, before clipping, unscaled under AMP. A clipped
      norm would hold the ratio at 1. So let the optimizer clip (``max_norm`` or ``clip``). If a trainer clips before
      ``step()``, call :meth:`record_norm` before it clips.
    * ``group["lr"]`` is never written, so any scheduler composes; see :meth:`effective_lrs`.
    * A step whose norm is inf or NaN is skipped: parameters, momentum and history stay as they are. Squares are
      added in float32, those of float64 gradients in float64: a norm beyond 1e19 (1e154) counts as infinite.
    * If all norms so far are 0, the ratio is 1.
    * ``norm_source="momentum"``: :math:`n_t = \lVert b_{t-1} \rVert_2`, the momentum as step :math:`t-1` left
      it, since :math:`b_t` is formed in the same pass that needs :math:`\eta_t`. It has less mini-batch
      noise, but holds weight decay and clipping. While it is 0 (before the first update) nothing is recorded.
    * Parameters without a gradient are left out of norm and update; without any gradient ``step()`` does
      nothing.

    Args:
        params: parameters, ``named_parameters()`` or groups, as for every torch optimizer. Groups may set
            their own ``lr``, ``momentum``, ``nesterov``, ``weight_decay``, ``maximize`` and ``fused``; norm
            and ratio are one, and so are the other options.
        lr: :math:`\eta_0`, >= 0; a float or a 1-element tensor. It has to be reasonable: the ratio only
            lowers it.
        momentum: :math:`\mu`, in [0, 1).
        nesterov: Nesterov momentum; needs ``momentum`` > 0.
        weight_decay: :math:`\lambda`, >= 0.
        window: :math:`W`, >= 1, in steps.
        min_ratio: :math:`r_{\min}`, in [0, 1]; 1 turns the adaptation off and leaves torch's SGD, bit for
            bit.
        record_after: leave out the norms of the first so many (finite) steps, >= 0, e.g. those of a warm-up.
        half_life: :math:`h`, >= 0, in recorded steps: the zenith halves in so many, unless a mean reaches it, so
            that the peak of a steep start or of an outlier doesn't hold the LR down for good. 0 keeps it, as in the
            paper.
        norm_source: ``"gradient"`` or ``"momentum"``.
        max_norm: clip the gradient to this global norm, > 0, as ``torch.nn.utils.clip_grad_norm_`` does, in
            the same pass as the update and with the norm that is there anyway. None: no clipping.
        clip: any other clipping: called in every step, after the norm was measured, with the list of the
            parameters that have a gradient (unscaled), to change their ``.grad`` in place. Excludes
            ``max_norm``.
        max_nonfinite_steps: so many skipped steps in a row raise ``FloatingPointError``, >= 1.
        fused: None takes torch's fused kernel (CPU, CUDA) wherever it can; False never; True raises where it
            can't. With True ``GradScaler`` also leaves it to the kernel to unscale and to skip, as for torch's fused
            optimizers: the host doesn't wait, and skipped steps are counted here.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an argument is out of its range; it is named with its value and range.

    **State.** ``state[p]["momentum_buffer"]`` as in ``torch.optim.SGD``, and once for all parameters 8 W
    bytes of norms and a few scalars, on the parameters' device. In ``state_dict()`` they are
    ``["param_groups"][0]["zenith"]``: ``norms`` (W, oldest first, NaN where there is none yet), ``zenith``,
    ``ratio``, ``grad_norm`` (0-dim float64) and ``counts`` (4, int64: recorded, finite, skipped, skipped in a
    row).

    **Other optimizers' states.** ``torch.optim.SGD`` loads this one's state and goes on, and the other way round.
    Between this and AdamW or :class:`ZENITHAdamW`, the options stay the constructor's and momentum starts empty. For
    torch's classes see :func:`accept_other_states`.

    **State for logging.** :meth:`zenith_state` and :meth:`effective_lrs` wait for the device. ``step()`` doesn't: on
    CUDA it never reads anything back. (But a sparse gradient is coalesced, which waits inside torch.)

    **Subclasses** whose ``step()`` clips and then calls this one: the norm is measured before their ``step()``
    begins (with a closure, after it). They get gradients that ``GradScaler`` has unscaled, as those of other
    optimizers do; one that works on scaled gradients says so with ``_step_supports_amp_scaling = True`` in its
    body.

    **Distributed.** DDP: every rank has the same gradient, so the same ratio, and nothing is communicated.
    FSDP2 and other DTensors: the norm is the global one, for one more all-reduce of a scalar. FSDP1 and
    ``ZeroRedundancyOptimizer`` hand over parts that don't tell of the rest: refused, in more than one process.

    **torch.compile.** ``torch.compile(optimizer.step, fullgraph=True)`` works; make ``lr`` a tensor if a
    scheduler changes it, and the scheduler after compiling: it puts a wrapper around ``step`` that can't be compiled
    (and warns without reason that it was stepped first, as it doesn't see the compiled ``step``).
    In compiled steps ``max_nonfinite_steps`` isn't looked at: see
    ``consecutive_nonfinite`` in :meth:`zenith_state`.

    Example::

        optimizer = ZENITH(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, window=100)
        for images, targets in loader:
            loss = loss_fn(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    """

    _buffers = ("momentum_buffer",)
    _absent: ClassVar[dict[str, Any]] = {
        "dampening": 0.0,
        "differentiable": False,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
    }

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        *,
        nesterov: bool = False,
        weight_decay: float = 0.0,
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
                "momentum": momentum,
                "nesterov": nesterov,
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

    def _check_momentum(self, group: dict[str, Any]) -> None:
        momentum, nesterov = group["momentum"], group["nesterov"]
        require(is_real(momentum) and 0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require(not nesterov or momentum > 0, "momentum", momentum, "in (0, 1) with nesterov=True")
        measurable = self.norm_source != "momentum" or momentum > 0
        require(measurable, "momentum", momentum, "in (0, 1) with norm_source='momentum'")

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"] != 0)

    def _update(self, group: dict[str, Any], batch: Batch, scalars: Scalars, *, fused: bool) -> None:
        sgd_(
            *batch,
            scalars,
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            fused=fused,
        )


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bufs: Sequence[Tensor | None],
    scalars: Scalars,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
    fused: bool,
) -> None:
    """One step of SGD on ``params`` in place: ``torch.optim.SGD`` with tensors for the learning rate and the
    rest.

    Args:
        params: parameters; devices and types may be mixed.
        grads: their gradients; sparse ones only without momentum and weight decay. The fused kernel leaves
            them divided by ``grad_scale``, as ``GradScaler.unscale_`` and ``clip_grad_norm_`` do.
        bufs: their momentum buffers, zeros before the first step; None without momentum.
        scalars: learning rate, whether to skip, gradient scale.
        momentum, nesterov, weight_decay, maximize: as in ``torch.optim.SGD``.
        fused: use torch's fused kernel wherever it can; else (and for the rest) tensor by tensor.
    """
    if any(type(grad) is not Tensor and is_dtensor(grad) for grad in grads):
        params, grads, bufs = zip(*map(local, params, grads, bufs))
    if fused:
        params, grads, bufs = _fused_sgd_(
            params, grads, bufs, scalars, momentum, nesterov, weight_decay, maximize
        )
    for param, grad, buf in zip(params, grads, bufs):
        here = scalars.to(param.device)
        if grad.layout is torch.strided:
            _single_tensor_sgd_(param, grad, buf, here, momentum, nesterov, weight_decay, maximize)
        else:
            _sparse_sgd_(param, grad, here, maximize)


def _single_tensor_sgd_(
    param: Tensor,
    grad: Tensor,
    buf: Tensor | None,
    scalars: Scalars,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
) -> None:
    r"""The definition, for one parameter, in operations that every device and type has; in float32 or better.

    ``scalars.lr`` is :math:`\eta_t`: the group's LR times the ratio, which ``NormHistory.update()`` makes of the norms.
    """
    skip = scalars.skip.bool()
    old, step = in_float32(param, grad, scalars, maximize)
    dtype = old.dtype
    if weight_decay:
        step = step + weight_decay * old
    if buf is not None:
        velocity = momentum * buf.to(dtype) + step
        step = step + momentum * velocity if nesterov else velocity
        # Selected and not multiplied by 0: 0 times inf is NaN.
        buf.copy_(torch.where(skip, buf, velocity))
    param.copy_(torch.where(skip, param, old - scalars.lr * step))


def _sparse_sgd_(param: Tensor, grad: Tensor, scalars: Scalars, maximize: bool) -> None:
    """Plain SGD of the rows that ``grad`` (sparse, coalesced) touches."""
    values = grad.values() if scalars.grad_scale is None else grad.values() / scalars.grad_scale
    step = torch.where(scalars.skip.bool(), 0.0, scalars.lr * values)
    update = torch.sparse_coo_tensor(
        grad.indices(), step.to(param.dtype), grad.shape, is_coalesced=True, check_invariants=False
    )
    param.add_(update if maximize else -update)


def _fused_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bufs: Sequence[Tensor | None],
    scalars: Scalars,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]:
    """Updates what the fused kernel can; returns the rest."""
    able = list(map(fused_supports, params, grads, bufs))
    rest: tuple[list[Tensor], list[Tensor], list[Tensor | None]] = ([], [], [])
    if not all(able):
        unable = [not yes for yes in able]
        rest = (list(compress(params, unable)), list(compress(grads, unable)), list(compress(bufs, unable)))
        params, grads, bufs = (list(compress(one, able)) for one in (params, grads, bufs))
    lists = (params, grads, bufs) if momentum else (params, grads)
    for bucket in by_device_and_dtype(*lists):
        device = bucket[0][0].device
        lr, skip, grad_scale = scalars.to(device)
        torch._fused_sgd_(
            bucket[0],
            bucket[1],
            bucket[2] if momentum else [],
            weight_decay=weight_decay,
            momentum=momentum,
            # The CUDA kernel reads a float32; the CPU one any type, and float64 parameters want all of it.
            lr=lr if device.type == "cpu" else lr.float(),
            dampening=0.0,
            nesterov=nesterov,
            maximize=maximize,
            is_first_step=False,
            grad_scale=grad_scale,
            found_inf=skip,
        )
    return rest
