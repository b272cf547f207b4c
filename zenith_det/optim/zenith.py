"""ZENITH: SGD whose learning rate follows the history of the gradient norm."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._history import NormHistory
from ._norm import global_norm, is_dtensor
from ._sgd import Scalars, fused_supports, sgd_
from ._watch import HistoryWatch

__all__ = ["ZENITH"]

logger = logging.getLogger(__name__)

_NORM_SOURCES = ("gradient", "momentum")
_HISTORY_KEY = "zenith"
"""Where ``state_dict()`` keeps the history, in the first parameter group: torch casts state under a
parameter's key to that parameter's type, and torch.distributed.checkpoint knows no other place."""


class ZENITH(torch.optim.Optimizer):
    r"""SGD with the learning rate (LR) set by how the gradient norm has evolved.

    Zero-overhead Evolution using Norm-Informed Training History (D. Saha, arXiv 2601.15212). With :math:`g_t`
    the gradient of all parameters of all groups together, as ``backward()`` left it, step :math:`t` is

    .. math::
        \begin{aligned}
            n_t      &= \lVert g_t \rVert_2                                                           \\
            m_t      &= \operatorname{mean}(n_{t-W+1}, \dots, n_t)                                    \\
            M_t      &= \max(M_{t-1}, m_t)                                                            \\
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
    :math:`\mu`                ``momentum``      momentum factor
    :math:`\lambda`            ``weight_decay``  L2 penalty
    :math:`n_t`                ``norm_source``   what the norm is of; ``record_after`` leaves out the first
    ========================== ================= =========================================================

    Steep regions, early in training, have large norms and get the full LR; as the norm falls, so does the LR.
    There is no schedule, hence no length of training to know beforehand, and no ``train()``/``eval()`` mode
    to switch.

    **From the paper**: the queue of W norms, its mean, the maximum of the mean (the "zenith"), :math:`\eta_0`
    until the queue is full, their ratio times :math:`\eta_0` from then on; SGD without momentum
    (``momentum=0``).

    **Decided here**, where the paper leaves it open:

    * Norms are of the raw loss gradient: before weight decay, before clipping, unscaled under AMP. A clipped
      norm would hold the ratio at 1. Give clipping to the optimizer (``max_norm`` or ``clip``) or, where a
      trainer clips before ``step()``, call :meth:`record_norm` before it does.
    * ``group["lr"]`` is never written, so any scheduler composes; see :meth:`effective_lrs`.
    * A step whose norm is inf or NaN is skipped whole: parameters, momentum and history stay. Squares are
      added in float32: a norm beyond 1e19 counts as infinite.
    * If all norms so far are 0, the ratio is 1.
    * ``norm_source="momentum"``: :math:`n_t = \lVert b_{t-1} \rVert_2`, the momentum as step :math:`t-1` left
      it, since :math:`b_t` is formed in the same pass that needs :math:`\eta_t`. It has less mini-batch
      noise, but holds weight decay and clipping. While it is 0 (before the first update) nothing is recorded.
    * Parameters without a gradient are left out of norm and update; without any gradient ``step()`` does
      nothing.

    Args:
        params: parameters, ``named_parameters()`` or groups, as for every torch optimizer. Groups may set
            their own ``lr``, ``momentum``, ``nesterov``, ``weight_decay``, ``maximize`` and ``fused``; norm
            and ratio are one.
        lr: :math:`\eta_0`, >= 0; a float or a 1-element tensor. It has to be reasonable: the ratio only
            lowers it.
        momentum: :math:`\mu`, in [0, 1).
        nesterov: Nesterov momentum; needs ``momentum`` > 0.
        weight_decay: :math:`\lambda`, >= 0.
        window: :math:`W`, >= 1, in steps.
        min_ratio: :math:`r_{\min}`, in [0, 1]; 1 turns the adaptation off and leaves torch's SGD, bit for
            bit.
        record_after: leave out the norms of the first so many (finite) steps, >= 0, e.g. those of a warm-up.
        norm_source: ``"gradient"`` or ``"momentum"``.
        max_norm: clip the gradient to this global norm, > 0, as ``torch.nn.utils.clip_grad_norm_`` does, in
            the same pass as the update and with the norm that is there anyway. None: no clipping.
        clip: any other clipping: called in every step, after the norm was measured, with the list of the
            parameters that have a gradient (unscaled), to change their ``.grad`` in place. Excludes
            ``max_norm``.
        max_nonfinite_steps: so many skipped steps in a row raise ``FloatingPointError``, >= 1.
        fused: None takes torch's fused kernel (CPU, CUDA) wherever it can; False never; True raises where it
            can't.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an argument is out of its range; it is named with its value and range.

    **State.** ``state[p]["momentum_buffer"]`` as in ``torch.optim.SGD``, and once for all parameters 8 W
    bytes of norms and a few scalars, on the parameters' device. In ``state_dict()`` they are
    ``["param_groups"][0]["zenith"]``: ``norms`` (W, oldest first, NaN where there is none yet), ``zenith``,
    ``ratio``, ``grad_norm`` (0-dim float64) and ``counts`` (4, int64: recorded, finite, skipped, skipped in a
    row).

    **State for logging.** :meth:`zenith_state` and :meth:`effective_lrs`; both wait for the device,
    ``step()`` doesn't: on CUDA it never reads anything back (but a sparse gradient is coalesced, which waits
    inside torch).

    **Subclasses** whose ``step()`` clips and then calls this one: the norm is measured before their ``step()``
    begins (with a closure, after it). They get gradients that ``GradScaler`` has unscaled, as those of other
    optimizers do; one that works on scaled gradients says so with ``_step_supports_amp_scaling = True`` in its
    body.

    **Distributed.** DDP: every rank has the same gradient, hence the same ratio, and nothing is communicated.
    FSDP2 and other DTensors: the norm is the global one, for one more all-reduce of a scalar.

    **torch.compile.** ``torch.compile(optimizer.step, fullgraph=True)`` works; make ``lr`` a tensor if a
    scheduler changes it. In compiled steps ``max_nonfinite_steps`` isn't looked at: see
    ``consecutive_nonfinite`` in :meth:`zenith_state`.

    Example::

        optimizer = ZENITH(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, window=100)
        for images, targets in loader:
            loss = loss_fn(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    """

    # GradScaler then leaves the gradients scaled and hands over grad_scale and found_inf for step() to use on
    # the device, instead of waiting for the device to tell whether step() is to be called.
    _step_supports_amp_scaling = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A step of its own, such as those that clip first (Detectron2's maybe_add_gradient_clipping makes one), in
        # the class or in a base that is none of ours.
        owner = next(base for base in cls.__mro__ if "step" in vars(base))
        if owner is not cls and issubclass(owner, ZENITH):
            return
        cls.step = _measured_first(cls.step)  # type: ignore[method-assign]
        # It takes gradients for unscaled, as torch.optim.SGD's would be.
        if "_step_supports_amp_scaling" not in vars(cls):
            cls._step_supports_amp_scaling = False

    _buffers: tuple[str, ...] = ("momentum_buffer",)
    """The state of a parameter that has its shape, the momentum first."""
    _not_taken: tuple[str, ...] = ("dampening",)
    """Options of torch's own that a loaded state must not have."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        window: int = 100,
        min_ratio: float = 0.0,
        record_after: int = 0,
        norm_source: str = "gradient",
        max_norm: float | None = None,
        clip: Callable[[list[Tensor]], object] | None = None,
        max_nonfinite_steps: int = 50,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "fused": fused,
        }
        self._set_up(
            params,
            defaults,
            window=window,
            min_ratio=min_ratio,
            record_after=record_after,
            norm_source=norm_source,
            max_norm=max_norm,
            clip=clip,
            max_nonfinite_steps=max_nonfinite_steps,
        )

    def _set_up(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        window: int = 100,
        min_ratio: float = 0.0,
        record_after: int = 0,
        norm_source: str = "gradient",
        max_norm: float | None = None,
        clip: Callable[[list[Tensor]], object] | None = None,
        max_nonfinite_steps: int = 50,
    ) -> None:
        """What the constructor does, whatever the update."""
        require(_is_integer(window, least=1), "window", window, "an integer >= 1")
        require(is_real(min_ratio) and 0 <= min_ratio <= 1, "min_ratio", min_ratio, "in [0, 1]")
        require(_is_integer(record_after, least=0), "record_after", record_after, "an integer >= 0")
        require(norm_source in _NORM_SOURCES, "norm_source", norm_source, f"one of {_NORM_SOURCES}")
        positive = max_norm is None or (is_real(max_norm) and 0 < max_norm < math.inf)
        require(positive, "max_norm", max_norm, "None or in (0, inf)")
        require(clip is None or callable(clip), "clip", clip, "None or a callable")
        require(clip is None or max_norm is None, "clip", clip, "None where max_norm is given")
        limit = max_nonfinite_steps
        require(_is_integer(limit, least=1), "max_nonfinite_steps", limit, "an integer >= 1")
        self.norm_source = norm_source
        self.max_norm = max_norm
        self.clip = clip
        self.max_nonfinite_steps = max_nonfinite_steps
        self._history = NormHistory(int(window), float(min_ratio), int(record_after))
        self._measured: Tensor | None = None
        self._effective_lrs: list[Tensor] = []
        self._streak = _StreakReader()
        self._watch = HistoryWatch()
        self._check_group(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its gradients join the norm, its ``lr`` and the rest default to the constructor's.

        Raises:
            ValueError: one of the group's options is out of its range.
        """
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for name in self.defaults:
            value = param_group[name]
            if is_real(value):  # a NumPy number would keep a checkpoint from loading
                param_group[name] = float(value)
            elif isinstance(value, list | tuple):
                param_group[name] = tuple(map(float, value))

    def _check_group(self, group: dict[str, Any]) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor):
            require(lr.numel() == 1, "lr", lr, "a float or a 1-element tensor")
            require(0 <= lr.item() < math.inf, "lr", lr, "in [0, inf)")
        else:
            require(is_real(lr) and 0 <= lr < math.inf, "lr", lr, "in [0, inf)")
        self._check_momentum(group)
        require(is_real(decay) and 0 <= decay < math.inf, "weight_decay", decay, "in [0, inf)")
        require(group["fused"] in (None, False, True), "fused", group["fused"], "None, False or True")

    def _check_momentum(self, group: dict[str, Any]) -> None:
        momentum, nesterov = group["momentum"], group["nesterov"]
        require(is_real(momentum) and 0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require(not nesterov or momentum > 0, "momentum", momentum, "in (0, 1) with nesterov=True")
        measurable = self.norm_source != "momentum" or momentum > 0
        require(measurable, "momentum", momentum, "in (0, 1) with norm_source='momentum'")

    # One step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of all parameters that have a gradient.

        Args:
            closure: computes the loss anew, gradients included; called once, first.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            FloatingPointError: the norm was inf or NaN ``max_nonfinite_steps`` times in a row; the first
                parameters with such gradients are named. On CUDA it comes a few steps late, since the host
                doesn't wait.
            TypeError: a gradient has a layout other than strided or sparse COO.
            ValueError: a group has ``fused=True`` and a parameter that the fused kernel can't update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        measured, self._measured = self._measured, None
        batches = self._batches()
        if not any(batch.params for batch in batches):
            return loss
        norm = measured if measured is not None else _grad_norm(batches)
        self._move_history(norm.device)
        like = self._history.ratio

        # GradScaler sets these for the time of this call: gradients are still scaled then.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        divisor = None if grad_scale is None else _scalar(grad_scale, like)
        norm = _scalar(norm, like) if divisor is None else _scalar(norm, like) / divisor
        finite = norm < math.inf  # False for NaN
        if found_inf is not None:
            finite = finite & (_scalar(found_inf, like) == 0)
        ratio = self._update_history(norm, finite, batches)

        if self.clip is not None:
            params = [param for batch in batches for param in batch.params]
            if divisor is not None:
                for param in params:
                    param.grad.div_(divisor.to(param.device, torch.float32))  # type: ignore[union-attr]
                divisor = None
            self.clip(params)
            batches = self._batches()
        elif self.max_norm is not None:
            # As in torch.nn.utils.clip_grad_norm_, but as a divisor, which the fused kernel takes.
            excess = ((norm + 1e-6) / self.max_norm).clamp_min(1.0)
            divisor = excess if divisor is None else divisor * excess

        skip = finite.logical_not().float()
        divisor = None if divisor is None else divisor.float()
        compiling = torch.compiler.is_compiling()
        self._effective_lrs = [ratio * _lr(group, like) for group in self.param_groups]
        for group, batch, lr in zip(self.param_groups, batches, self._effective_lrs):
            # A compiler fuses the plain operations itself, and can't look into the fused kernel.
            fused = group["fused"] is not False and not compiling
            self._update(group, batch, Scalars(lr, skip, divisor), fused=fused)

        if compiling:
            return loss
        self._watch.look(self._history)
        if self._streak.read(self._history.streak) >= self.max_nonfinite_steps:
            # GradScaler would take them away after the call; left, they would scale the next step's gradients.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            self._raise_nonfinite()
        return loss

    def _update(self, group: dict[str, Any], batch: Batch, scalars: Scalars, *, fused: bool) -> None:
        """The update of one group's parameters, in place."""
        sgd_(
            *batch,
            scalars,
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            fused=fused,
        )

    def _update_history(self, norm: Tensor, finite: Tensor, batches: list[Batch]) -> Tensor:
        """Gradient norm in, r_t out."""
        record = finite & _trains(self.param_groups, norm)
        if self.norm_source == "gradient":
            return self._history.update(norm, record, norm, finite)
        velocity = _scalar(global_norm(b for batch in batches for b in batch.bufs if b is not None), norm)
        record = finite & (velocity > 0) & (velocity < math.inf)
        return self._history.update(velocity, record, norm, finite)

    def _move_history(self, device: torch.device) -> None:
        """Takes the history from the CPU, where it starts, to an accelerator that norms are on."""
        if self._history.device.type == "cpu" and device.type != "cpu":
            self._history.to(device)

    @torch.no_grad()
    def record_norm(self) -> Tensor:
        """Measures the norm of the gradients as they are now, for the next :meth:`step` to use as
        :math:`n_t`.

        For a trainer that clips (or changes) gradients itself before ``step()``: call it after the last
        ``backward()`` and before the clipping. Under AMP, call it after ``GradScaler.unscale_(optimizer)`` if
        you do unscale.

        Returns:
            The norm, 0-dim, on the device: ``torch.nn.utils.clip_grads_with_norm_`` can use it again.
        """
        self._measured = _grad_norm(self._batches(bufs=False))
        return self._measured

    def _batches(self, bufs: bool = True) -> list[Batch]:
        """For every group the parameters that have a gradient, ready for norm and update."""
        batches = []
        for index, group in enumerate(self.param_groups):
            params = [param for param in group["params"] if param.grad is not None]
            grads: list[Tensor] = [param.grad for param in params]
            if not all(grad.layout is torch.strided for grad in grads):
                grads = [self._usable(grad, param, index) for grad, param in zip(grads, params)]
            with_momentum = bufs and self._has_momentum(group)
            batch = Batch(params, grads, [self._buffer(p) if with_momentum else None for p in params])
            if group["fused"]:
                self._check_fused(batch, index)
            batches.append(batch)
        return batches

    def _usable(self, grad: Tensor, param: Tensor, index: int) -> Tensor:
        """``grad`` as norm and update take it: strided, or sparse and coalesced."""
        if grad.layout is torch.strided:
            return grad
        if grad.layout is not torch.sparse_coo:
            raise TypeError(
                f"gradient of {self._name(param, index)} is {grad.layout}, neither strided nor sparse_coo"
            )
        group = self.param_groups[index]
        # Momentum and weight decay update every row anyway: there a sparse gradient saves nothing.
        sparse = not self._has_momentum(group) and group["weight_decay"] == 0
        return grad.coalesce() if sparse else grad.to_dense()

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"] != 0)

    def _check_fused(self, batch: Batch, index: int) -> None:
        for param, grad, buf in zip(*batch):
            if not fused_supports(param, grad, buf):
                kind = f"{self._name(param, index)} ({param.dtype}, {param.device}, {grad.layout})"
                raise ValueError(f"fused must be None or False for {kind}, got True")

    def _buffer(self, param: Tensor) -> Tensor:
        """The parameter's momentum."""
        state = self.state[param]
        # Zeros, and not "first step: b = g" as in torch: whether the first step is skipped, only the device
        # knows.
        buf: Tensor | None = state.get(self._buffers[0])
        if buf is None:
            buf = state[self._buffers[0]] = torch.zeros_like(param)
        return buf

    # Reading it.

    def zenith_state(self) -> dict[str, float | int]:
        """The state after the last step as Python numbers, for logs. Waits for the device.

        Returns:
            ``ratio`` r_t, ``grad_norm`` (of the raw gradient; inf or NaN in a skipped step), ``window_mean``
            m_t (of what there is while the window is not full), ``zenith`` M_t (0 while it is not full),
            ``skipped_steps``, ``recorded_steps`` and ``consecutive_nonfinite`` (steps skipped in a row up to
            now).
        """
        return self._history.read()

    @property
    def grad_norm(self) -> Tensor:
        """0-dim, on the device: the raw gradient norm of the last step, finite or not. Waits for nothing."""
        return self._history.grad_norm

    @property
    def consecutive_nonfinite(self) -> Tensor:
        """0-dim int64, on the device: how many steps were skipped in a row up to now. Waits for nothing."""
        return self._history.streak

    def effective_lrs(self) -> list[float]:
        """The LR of every group in the last step's update: its ``lr`` at that time, times the ratio. Waits
        for the device. Before the first step (and after loading), and for a group added since: the group's
        ``lr`` times the last ratio.
        """
        used = self._effective_lrs
        ratio = self._history.ratio
        rest = [ratio * _lr(group, ratio) for group in self.param_groups[len(used) :]]
        return torch.stack(used + rest).tolist()  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        history = self._history
        options = {
            "window": history.window,
            "min_ratio": history.min_ratio,
            "record_after": history.record_after,
            "norm_source": self.norm_source,
            "max_norm": self.max_norm,
            "clip": self.clip,
            "max_nonfinite_steps": self.max_nonfinite_steps,
        }
        lines = "".join(f"    {name}: {value}\n" for name, value in options.items())
        return super().__repr__().removesuffix(")") + f"All Groups\n{lines})"

    # Saving and loading.

    def reset_history(self, reason: str = "") -> None:
        """Forgets norms and zenith, and says so in the log: the ratio is 1 until W new norms are there.

        For a change that old norms mislead after, such as another global batch size: the noise in the norm
        depends on it.

        Args:
            reason: for the log line.
        """
        self._history.reset()
        self._measured = None
        because = f" ({reason})" if reason else ""
        window = self._history.window
        logger.info("history starts anew%s: the LR ratio is 1 until %d norms are recorded", because, window)

    def state_dict(self) -> dict[str, Any]:
        """The whole state: torch's layout, and the history under ``["param_groups"][0]["zenith"]``."""
        state_dict = super().state_dict()
        state_dict["param_groups"][0][_HISTORY_KEY] = self._history.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned; training continues bit for bit.

        ``window`` and the other options that are the same for all groups stay the constructor's. With another
        window the newest norms that fit are kept; into a longer one the last ratio holds until it is full. A
        state without history (of ``torch.optim.SGD``, say) is loaded with a warning, and the history starts
        anew.

        Raises:
            ValueError: the groups don't match, or a momentum buffer doesn't have its parameter's shape.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        history = groups[0].pop(_HISTORY_KEY, None)
        self._check_shapes(state_dict["state"], groups)
        super().load_state_dict({**state_dict, "param_groups": groups})

        self._measured = None
        self._effective_lrs = []
        self._streak = _StreakReader()
        if history is not None:
            self._history.load_state_dict(history)
        else:
            logger.warning("the loaded optimizer state has no ZENITH history: is it another optimizer's?")
            self.reset_history("none was loaded")

    def _check_shapes(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        # torch would load any buffer, and fail (or not) in the next step.
        for index, (group, saved) in enumerate(zip(self.param_groups, groups)):
            for param, key in zip(group["params"], saved["params"]):
                for name in self._buffers:
                    buf = state.get(key, {}).get(name)
                    if buf is not None and buf.shape != param.shape:
                        raise ValueError(
                            f"loaded {name} of {self._name(param, index)} has shape {tuple(buf.shape)}, "
                            f"the parameter {tuple(param.shape)}: is the state of another model?"
                        )

    def __getstate__(self) -> dict[str, Any]:
        options = ("norm_source", "max_norm", "clip", "max_nonfinite_steps")
        own = (*options, "_history", "_measured", "_effective_lrs")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._streak = _StreakReader()
        self._watch = HistoryWatch()
        for group in self.param_groups:
            # The loaded groups may be those of an optimizer that doesn't have all options.
            for name in self.defaults.keys() - {"differentiable"}:  # which torch adds
                group.setdefault(name, self.defaults[name])
            for name in self._not_taken:
                require(not group.get(name), name, group.get(name), f"0: {type(self).__name__} has none")

    # Errors.

    def _name(self, param: Tensor, index: int) -> str:
        """How to name a parameter of group ``index`` in a message."""
        group = self.param_groups[index]
        place = next(i for i, other in enumerate(group["params"]) if other is param)
        if "param_names" in group:
            return str(group["param_names"][place])
        return f"parameter {place} of group {index}, shape {tuple(param.shape)}"

    def _raise_nonfinite(self) -> None:
        names: list[str] = []
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                grad = param.grad
                if grad is None or len(names) == 5:
                    continue
                if not global_norm([grad.to_local() if is_dtensor(grad) else grad]).isfinite():
                    names.append(self._name(param, index))
        first = "; ".join(names) or "none at hand (they are on another rank, or gone since)"
        raise FloatingPointError(
            f"the gradient norm was inf or NaN in {self.max_nonfinite_steps} steps in a row (all skipped); "
            f"first parameters with non-finite gradients: {first}"
        )


def _measured_first(step: Callable[..., Any]) -> Callable[..., Any]:
    """A subclass's ``step`` that may clip before it calls ZENITH's: the norm is taken before it does."""

    @functools.wraps(step)
    def measured_step(
        self: ZENITH, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        def measure() -> None:
            if self._measured is None:  # not by an outer class, nor by the trainer
                self.record_norm()

        if closure is None:
            measure()
            return step(self, closure, *args, **kwargs)

        def measured_closure() -> Any:
            loss = closure()
            measure()
            return loss

        return step(self, measured_closure, *args, **kwargs)

    return measured_step


class Batch(NamedTuple):
    """The parameters of a group that have a gradient, those gradients, and their momentum (None without)."""

    params: list[Tensor]
    grads: list[Tensor]
    bufs: list[Tensor | None]


def _grad_norm(batches: list[Batch]) -> Tensor:
    return global_norm(grad for batch in batches for grad in batch.grads)


class _StreakReader:
    """Reads a counter off the device without waiting for it: the value is one that it had a few steps ago."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def read(self, streak: Tensor) -> int:
        """The newest value of ``streak`` (0-dim, integer) that has arrived on the host; 0 if none has."""
        if streak.device.type != "cuda":
            return int(streak)
        if torch.cuda.is_current_stream_capturing():
            return 0
        value = 0
        if self._copy is None or self._copied is None:
            self._copy = torch.zeros((), dtype=streak.dtype, pin_memory=True)
            self._copied = torch.cuda.Event()
        elif self._copied.query():
            value = int(self._copy)
        else:
            return 0
        self._copy.copy_(streak, non_blocking=True)
        self._copied.record()
        return value


def _trains(param_groups: list[dict[str, Any]], norm: Tensor) -> Tensor | bool:
    """False where torch.distributed.checkpoint steps with lr 0 and zero gradients, to see the state."""
    lrs = [group["lr"] for group in param_groups]
    if not all(isinstance(lr, Tensor) or lr == 0 for lr in lrs):
        return True
    trains = norm > 0
    for lr in lrs:
        if isinstance(lr, Tensor):
            trains = trains | (_scalar(lr, norm) != 0)
    return trains


def _lr(group: dict[str, Any], like: Tensor) -> float | Tensor:
    lr: float | Tensor = group["lr"]
    return _scalar(lr, like) if isinstance(lr, Tensor) else lr


def _scalar(value: Tensor, like: Tensor) -> Tensor:
    """``value`` (1 element) as a 0-dim tensor of the type and on the device of ``like``."""
    return value.reshape(()).to(like.device, like.dtype, non_blocking=not like.is_cpu)


def is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
