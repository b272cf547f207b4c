"""ZENITH's learning rate under any optimizer that somebody else has built."""

from __future__ import annotations

import functools
import logging
import math
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._base import (
    as_scalar,
    has_history,
    keep_place,
    put_history,
    require_history_options,
    take_history,
    trains,
)
from ._checks import is_real
from ._history import NormHistory
from ._norm import global_norm, is_dtensor
from ._watch import HistoryWatch, StreakReader
from .zenith import ZENITH
from .zenith_adamw import ZENITHAdamW

__all__ = ["ZenithRatio", "zenith_of"]

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_zenith_ratio"
_SHARED = ("zenith_state", "effective_lrs", "record_norm", "reset_history")
"""Methods that the optimizer gets, so that a loop reads the same whether it holds a ZENITH or has the ratio over it."""
_WRAPPED = ("_optimizer", "optimizer")
"""Where Lightning's, Fabric's and accelerate's wrappers keep the optimizer."""


class ZenithRatio:
    r"""Puts ZENITH's ratio over an optimizer of any class, in place.

    Each ``optimizer.step()`` is then made at every group's LR times the ratio :math:`r_t` of :class:`ZENITH`: the mean
    of the last W norms of the raw gradient, of all groups together, over the highest such mean so far. ::

        optimizer = torch.optim.AdamW(groups_of_your_own, lr=1e-4)
        ZenithRatio(optimizer, window=100)

    The optimizer stays the object it is, of its class, with its groups, state, schedulers and clipping. Over
    ``torch.optim.SGD`` it trains as :class:`ZENITH`, over ``torch.optim.AdamW`` as :class:`ZENITHAdamW`.

    * The norm is measured when ``step()`` begins (with a closure: when that has run for the first time), before any
      clipping that the optimizer's class or its hooks do. A loop that clips between ``backward()`` and ``step()`` calls
      ``optimizer.record_norm()`` before it clips.
    * ``group["lr"]`` is changed for the time of the step and then put back, the same float or tensor: it is its
      owner's, a scheduler's, before and after.
    * A step whose norm is inf or NaN is skipped, and the history stays as it is. Without any gradient nothing is
      recorded.
    * The history is part of the optimizer's ``state_dict()``, as :class:`ZENITH` has it in its own
      (``["param_groups"][0]["zenith"]``), and is restored by ``load_state_dict()``. Optimizers without the ratio
      load such a state too. ``copy.deepcopy`` and ``pickle`` keep the ratio.
    * The optimizer gets :meth:`zenith_state`, :meth:`effective_lrs`, :meth:`record_norm` and :meth:`reset_history` as
      methods; :func:`zenith_of` finds this object, also through wrappers.

    **On CUDA** the LR is a Python number in most optimizers, and the host would have to wait for the norm. Instead

    * groups with ``fused=True`` of torch's SGD, Adam and AdamW get LR and skipping as device tensors, groups with
      ``capturable=True`` of torch's optimizers the LR: exactly this step's, nothing waits;
    * other groups get the ratio of **the step before**. It has been on its way for a whole step, so that reading it
      doesn't hold up the device: if the host is further ahead than that, it waits until it isn't (every process of a
      distributed run has to take the same ratio). There a step whose norm isn't finite is taken as the
      optimizer takes it, since the host hears of it later: it is counted, and left out of the history.

    With ``wait=True`` the host waits for each step's norm instead, and every step has its own ratio. On other devices
    this is always so. The first step may wait, as optimizers make their state in it.

    **AMP.** Gradients that ``GradScaler`` hands over scaled (fused optimizers) are counted unscaled. Where it leaves
    out a step itself, nothing is recorded or counted.

    **torch.compile.** A compiled ``step()`` runs uncompiled, and ``fullgraph=True`` is refused by torch:
    :class:`ZENITH` and :class:`ZENITHAdamW` compile.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that takes its LR from ``group["lr"]``; through a wrapper of Lightning
            or accelerate the one inside.
        window, min_ratio, record_after, half_life, max_nonfinite_steps: as for :class:`ZENITH`.
        wait: wait for each norm where it isn't on the CPU.

    Raises:
        TypeError: ``optimizer`` isn't one, has a group without an LR, or (in its first step) sets
            ``group["lr"]`` itself.
        ValueError: an argument is out of its range, or ``optimizer`` has a ratio already.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        window: int = 100,
        min_ratio: float = 0.0,
        record_after: int = 0,
        half_life: int = 0,
        max_nonfinite_steps: int = 50,
        wait: bool = False,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if zenith_of(optimizer) is not None:
            raise ValueError(f"{type(optimizer).__name__} has ZENITH's ratio already")
        require_history_options(window, min_ratio, record_after, half_life, max_nonfinite_steps)
        self.max_nonfinite_steps = int(max_nonfinite_steps)
        self.wait = bool(wait)
        self._history = NormHistory(int(window), float(min_ratio), int(record_after), int(half_life))
        optimizer = _unwrapped(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            if not isinstance(group.get("lr"), Tensor) and not is_real(group.get("lr")):
                kind = type(optimizer).__name__
                raise TypeError(f"{kind} has no LR in group {index} that ZENITH's ratio could go on")
        self._set_up(optimizer)
        if has_history(optimizer.param_groups):  # it was loaded already
            self._take_history(optimizer)
        keep_place(optimizer.param_groups)

    def _set_up(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._measured: Tensor | None = None
        self._effective_lrs: list[float | Tensor] = []
        self._streak = StreakReader()
        self._watch = HistoryWatch()
        self._late = _RatioOfTheStepBefore()
        self._outermost: FrameType | None = None
        self._left_out: list[tuple[Tensor, Tensor]] = []
        self._in_step = False
        self._open: list[tuple[dict[str, Any], Any, Any]] = []  # group, its owner's LR, this step's LR
        self._set_attributes: dict[str, Any] = {}

        attributes = vars(optimizer)
        self._step_before = attributes.get("step")  # a scheduler's, say
        attributes[_ATTRIBUTE] = self
        attributes["step"] = MethodType(_step_of(self._step_before or type(optimizer).step), optimizer)
        attributes["__getstate__"] = self._state_of_the_optimizer
        attributes.update({name: getattr(self, name) for name in _SHARED})
        for when in ("step_pre", "step_post", "state_dict_post", "load_state_dict_post"):
            attributes.setdefault(
                f"_optimizer_{when}_hooks", OrderedDict()
            )  # not there yet when it is unpickled
        optimizer.register_step_pre_hook(self._before_a_class_steps)
        optimizer.register_step_post_hook(self._after_a_class_has_stepped)
        optimizer.register_state_dict_post_hook(self._add_history)
        optimizer.register_load_state_dict_post_hook(self._take_history)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the ratio is over."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the optimizer that the ratio was over is gone")
        return optimizer

    # One step.

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``optimizer.step(*args, **kwargs)``, its own, at the LRs times the ratio."""
        optimizer = self.optimizer
        loss, args, kwargs = _with_gradients(args, kwargs)
        if not self._begin():
            optimizer._opt_called = True  # type: ignore[attr-defined]  # or a scheduler would warn
            return loss
        self._in_step = True
        try:
            if self._step_before is not None:
                result = self._step_before(*args, **kwargs)
            else:
                result = type(optimizer).step(optimizer, *args, **kwargs)
        finally:
            self._in_step = False
            self._end()
        return loss if result is None else result

    # torch's hooks run around the step of each class that has had an instance, the inner ones on gradients that an
    # outer one may have clipped. They are for those who have kept a ``step`` from before (accelerate's, under AMP).

    def _before_a_class_steps(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._in_step:
            return None
        frame = sys._getframe(1)  # of the class's step; the outermost one's is no longer running if it raised
        if self._outermost is not None and _is_running(self._outermost, frame):
            return None
        self._outermost = frame
        _, rest, kwargs = _with_gradients(args[1:], kwargs)
        if not self._begin():
            # Without gradients every optimizer leaves everything as it is.
            self._left_out = _take_gradients(optimizer)
        return args[:1] + rest, kwargs

    def _after_a_class_has_stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._in_step or sys._getframe(1) is not self._outermost:
            return
        self._outermost = None
        for param, grad in self._left_out:
            param.grad = grad
        self._left_out = []
        self._end()

    @torch.no_grad()
    def _begin(self) -> bool:
        """Takes the norm into the history and puts the LRs of this step into the groups.

        Returns:
            False if the step is to be left out.
        """
        self._end()  # whatever an exception has left
        optimizer = self.optimizer
        groups = optimizer.param_groups
        if has_history(groups):  # loaded past torch's hooks
            self._take_history(optimizer)
        measured, self._measured = self._measured, None
        grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
        if not grads:
            return True
        norm = measured if measured is not None else global_norm(grads)
        history = self._history
        history.follow(norm)
        reads_late = _read_late(history.device) and not self.wait
        exact = not reads_late or _first_momentum(optimizer)

        like = history.ratio
        # GradScaler sets these for the time of the call: gradients are still scaled then.
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        norm = as_scalar(norm, like)
        if grad_scale is not None:
            norm = norm / as_scalar(grad_scale, like)
        finite = norm < math.inf  # False for NaN
        if found_inf is not None:
            finite = finite & (as_scalar(found_inf, like) == 0)
        if reads_late:
            self._late.start(history.ratio)
        ratio = history.update(norm, finite & trains(groups, norm), norm, finite)
        if reads_late:
            self._late.put(ratio)
        self._watch.look(history)

        if exact:
            value, is_finite = torch.stack((ratio, finite.to(ratio.dtype))).tolist()
            lrs = [_times(group["lr"], value) for group in groups]
        else:
            is_finite = True
            lrs = [self._lr_without_waiting(group, ratio) for group in groups]
            if any(_is_fused(optimizer, group) for group in groups):
                self._set_attributes = {"found_inf": found_inf}
                optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
        # Copies: an owner's tensor changes when its scheduler steps.
        self._effective_lrs = [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]
        if self._streak.read(history.streak) >= self.max_nonfinite_steps:
            self._end()
            self._raise_nonfinite()
        if not is_finite:
            return False
        for group, lr in zip(groups, lrs):
            self._open.append((group, group["lr"], lr))
            group["lr"] = lr
        return True

    def _lr_without_waiting(self, group: dict[str, Any], ratio: Tensor) -> float | Tensor:
        lr = group["lr"]
        optimizer = self.optimizer
        on_device = all(param.device == ratio.device for param in group["params"])
        if on_device and (_is_fused(optimizer, group) or _is_capturable(optimizer, group)):
            like = ratio.float()
            return like * (as_scalar(lr, like) if isinstance(lr, Tensor) else lr)
        if ratio.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(optimizer).__name__} takes its LR from the host, which a CUDA graph would keep for ever: make "
                "it with fused=True or capturable=True"
            )
        return _times(lr, self._late.get())

    def _end(self) -> None:
        """Gives the groups their owners' LRs back."""
        opened, self._open = self._open, []
        changed = None
        for index, (group, owners, lr) in enumerate(opened):
            if group["lr"] is lr:
                group["lr"] = owners
            else:
                changed = index
        for name, value in self._set_attributes.items():
            if value is None:
                vars(self.optimizer).pop(name, None)
            else:
                setattr(self.optimizer, name, value)
        self._set_attributes = {}
        if changed is not None:
            raise TypeError(
                f"{type(self.optimizer).__name__} sets the LR of group {changed} itself in step(), so that ZENITH's "
                "ratio can't go on it"
            )

    @torch.no_grad()
    def record_norm(self) -> Tensor:
        """Measures the norm of the gradients as they are now, for the next ``step()``: see :meth:`ZENITH.record_norm`.

        Within a step (a hook that clips, say) it is this step's norm, which has been taken.
        """
        if self._open:
            return self._history.grad_norm
        groups = self.optimizer.param_groups
        self._measured = global_norm(
            p.grad for group in groups for p in group["params"] if p.grad is not None
        )
        return self._measured

    # Reading it.

    def zenith_state(self) -> dict[str, float | int]:
        """The state after the last step as Python numbers: see :meth:`ZENITH.zenith_state`. Waits for the device."""
        return self._history.read()

    @property
    def grad_norm(self) -> Tensor:
        """0-dim, on the device: the raw gradient norm of the last step, finite or not. Waits for nothing."""
        return self._history.grad_norm

    @property
    def consecutive_nonfinite(self) -> Tensor:
        """0-dim int64, on the device: how many steps were skipped in a row up to now. Waits for nothing."""
        return self._history.streak

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether a step whose norm isn't finite is left out (else the optimizer takes it: see "On CUDA")."""
        optimizer = self.optimizer
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if self.wait or not any(_read_late(param.device) for param in params):
            return True
        return all(_is_fused(optimizer, group) for group in optimizer.param_groups)

    def effective_lrs(self) -> list[float]:
        """The LR of every group in the last step's update: see :meth:`ZENITH.effective_lrs`. Waits for the device."""
        used = self._effective_lrs
        rest = self.optimizer.param_groups[len(used) :]
        ratio = float(self._history.ratio) if rest else 1.0
        return [float(lr) for lr in used] + [float(group["lr"]) * ratio for group in rest]

    def __repr__(self) -> str:
        history = self._history
        return (
            f"ZenithRatio(over {type(self.optimizer).__name__}, window={history.window}, "
            f"min_ratio={history.min_ratio}, record_after={history.record_after}, "
            f"half_life={history.half_life}, "
            f"max_nonfinite_steps={self.max_nonfinite_steps}, wait={self.wait})"
        )

    # Saving and loading.

    def reset_history(self, reason: str = "") -> None:
        """Forgets norms and zenith, and says so in the log: see :meth:`ZENITH.reset_history`."""
        self._history.reset()
        self._measured = None
        self._late.forget()
        because = f" ({reason})" if reason else ""
        window = self._history.window
        logger.info("history starts again%s: the LR ratio is 1 until %d norms are recorded", because, window)

    def _add_history(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        put_history(state_dict["param_groups"], self._history)

    def _take_history(self, optimizer: Optimizer) -> None:
        """Takes the history out of the groups that were loaded."""
        history = take_history(optimizer.param_groups)
        keep_place(optimizer.param_groups)
        for group in optimizer.param_groups:  # those of another class may lack some
            for name, value in optimizer.defaults.items():
                group.setdefault(name, value)
        self._measured = None
        self._effective_lrs = []
        self._late.forget()
        self._streak = StreakReader()
        if history is not None:
            self._history.load_state_dict(history)
        else:
            logger.warning("the loaded optimizer state has no ZENITH history: is it another optimizer's?")
            self.reset_history("none was loaded")

    def _state_of_the_optimizer(self) -> Any:
        """What ``pickle`` and ``copy.deepcopy`` keep of the optimizer."""
        kind: Any = type(self.optimizer)
        state = kind.__getstate__(self.optimizer)
        return {**state, _ATTRIBUTE: self} if isinstance(state, dict) else state

    def __getstate__(self) -> dict[str, Any]:
        kept = ("max_nonfinite_steps", "wait", "_history")
        return {"optimizer": self.optimizer, **{name: vars(self)[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        optimizer = state.pop("optimizer")  # still empty: its own state refers to this object
        vars(self).update(state)
        self._set_up(optimizer)

    def _raise_nonfinite(self) -> None:
        names: list[str] = []
        for index, group in enumerate(self.optimizer.param_groups):
            for place, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None or len(names) == 5:
                    continue
                if not global_norm([grad.to_local() if is_dtensor(grad) else grad]).isfinite():
                    given = group.get("param_names")
                    unnamed = f"parameter {place} of group {index}, shape {tuple(param.shape)}"
                    names.append(str(given[place]) if given else unnamed)
        first = "; ".join(names) or "none at hand (they are on another rank, or gone since)"
        raise FloatingPointError(
            f"the gradient norm was inf or NaN in {self.max_nonfinite_steps} steps in a row; "
            f"first parameters with non-finite gradients: {first}"
        )


def zenith_of(optimizer: Any) -> ZENITH | ZENITHAdamW | ZenithRatio | None:
    """What sets the LR of ``optimizer`` by the history of its gradient norm, if anything does.

    Args:
        optimizer: any optimizer, or a wrapper of Lightning, Fabric or accelerate around one.

    Returns:
        The :class:`ZENITH` itself, or the :class:`ZenithRatio` over the optimizer; both have ``zenith_state()``,
        ``effective_lrs()``, ``record_norm()``, ``reset_history()``, ``grad_norm`` and ``consecutive_nonfinite``. None
        for other optimizers.
    """
    optimizer = _unwrapped(optimizer)
    if isinstance(optimizer, (ZENITH, ZENITHAdamW)):
        return optimizer
    ratio = getattr(optimizer, "__dict__", {}).get(_ATTRIBUTE)
    return ratio if ratio is not None and ratio._optimizer() is optimizer else None


def _unwrapped(optimizer: Any) -> Any:
    for _ in range(8):
        attributes = getattr(optimizer, "__dict__", {})
        inside = [attributes[name] for name in _WRAPPED if isinstance(attributes.get(name), Optimizer)]
        if not inside:
            break
        optimizer = inside[0]
    return optimizer


def _read_late(device: torch.device) -> bool:
    """Whether a scalar on ``device`` can be brought to the host without waiting for it."""
    return device.type == "cuda"


def _step_of(step: Callable[..., Any]) -> Callable[..., Any]:
    # Wraps: GradScaler reads the signature, torch's schedulers what they have left on a step before.
    @functools.wraps(step)
    def step_at_the_ratio(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return _uncompiled_step(vars(optimizer)[_ATTRIBUTE], args, kwargs)

    return step_at_the_ratio


@torch.compiler.disable
def _uncompiled_step(ratio: ZenithRatio, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return ratio._step(args, kwargs)


def _with_gradients(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Runs the closure among a step's arguments, if there is one, so that the gradients are there.

    Returns:
        Its loss (or None), and the arguments with a closure whose first call gives that loss.
    """
    closure = kwargs.get("closure") if "closure" in kwargs else (args[0] if args else None)
    if not callable(closure):
        return None, args, kwargs
    with torch.enable_grad():
        loss = closure()
    waiting = [loss]

    def replayed() -> Any:
        return waiting.pop() if waiting else closure()

    if "closure" in kwargs:
        return loss, args, {**kwargs, "closure": replayed}
    return loss, (replayed, *args[1:]), kwargs


def _take_gradients(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    taken = [(param, param.grad) for param in params]
    for param in params:
        param.grad = None
    return taken


def _is_running(frame: FrameType, within: FrameType | None) -> bool:
    """Whether ``frame`` is ``within`` or one that has called it."""
    while within is not None and within is not frame:
        within = within.f_back
    return within is not None


def _is_fused(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether torch's fused kernel makes the update, which takes LR and skipping as device tensors."""
    torchs = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return group.get("fused") is True and isinstance(optimizer, torchs)


def _is_capturable(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    torchs = any(base.__module__.startswith("torch.optim.") for base in type(optimizer).__mro__[:-2])
    return group.get("capturable") is True and torchs


def _first_momentum(optimizer: Optimizer) -> bool:
    """Whether a step makes momentum of torch's fused SGD, which is uninitialised memory if the device skips it."""
    return isinstance(optimizer, torch.optim.SGD) and any(
        param.grad is not None and optimizer.state.get(param, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        if group.get("fused") is True and group.get("momentum")
        for param in group["params"]
    )


def _times(lr: float | Tensor, ratio: float) -> float | Tensor:
    return lr if ratio == 1.0 else lr * ratio


class _RatioOfTheStepBefore:
    """Brings each step's ratio to the host while the device goes on, to be read one step later."""

    def __init__(self) -> None:
        # This step's and the one before's: a number in pinned memory, and when it has arrived.
        self._sent: list[tuple[Tensor, torch.cuda.Event]] = []

    def start(self, ratio: Tensor) -> None:
        """Before the first :meth:`put`: what the history holds."""
        if not self._sent:
            self.put(ratio)

    def put(self, ratio: Tensor) -> None:
        """Sends this step's ratio on its way."""
        if torch.cuda.is_current_stream_capturing():
            return
        if len(self._sent) == 2:
            copy, _ = self._sent.pop(0)
        else:
            copy = torch.empty((), dtype=ratio.dtype, device="cpu", pin_memory=True)
        copy.copy_(ratio, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._sent.append((copy, arrived))

    def get(self) -> float:
        """The ratio of the step before the one that has just been put."""
        copy, arrived = self._sent[0]
        if not arrived.query():
            arrived.synchronize()
        return float(copy)

    def forget(self) -> None:
        self._sent = []
