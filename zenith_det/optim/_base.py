"""ZENITH's learning rate under any update that knows it on the device: all of an optimizer but its formula."""

from __future__ import annotations

import functools
import logging
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ._checks import is_integer, is_real, require
from ._history import NormHistory
from ._norm import global_norm, is_dtensor
from ._update import Scalars, fused_supports
from ._watch import HistoryWatch, StreakReader

__all__ = [
    "HISTORY_KEY",
    "Batch",
    "ZenithOptimizer",
    "as_scalar",
    "has_history",
    "keep_place",
    "kind_of_state",
    "put_history",
    "require_history_options",
    "take_history",
    "trains",
]

logger = logging.getLogger("zenith_det.optim.zenith")

HISTORY_KEY = "zenith"
"""Where ``state_dict()`` keeps the history, in the first parameter group: torch casts state under a parameter's key to
that parameter's type, and torch.distributed.checkpoint knows no other place."""
_IN_EVERY_GROUP = "norm_history"
"""And in all of them, so that it isn't lost where groups are put in another order or taken apart. The first group has
this key all the time, with None: torch.distributed.checkpoint looks in a flattened state for what it sees there."""

_NORM_SOURCES = ("gradient", "momentum")
_OF_ALL_GROUPS = (
    "window",
    "min_ratio",
    "record_after",
    "half_life",
    "norm_source",
    "max_norm",
    "clip",
    "max_nonfinite_steps",
)
_WITHOUT_EFFECT = {"foreach": None, "capturable": False}
"""Options of torch's optimizers that choose an implementation, not a result."""


class Batch(NamedTuple):
    """The parameters of a group that have a gradient, those gradients, and their momentum (None without)."""

    params: list[Tensor]
    grads: list[Tensor]
    bufs: list[Tensor | None]


class ZenithOptimizer(torch.optim.Optimizer):
    """What :class:`ZENITH` and :class:`ZENITHAdamW` share: the norm, its history and the ratio, clipping, skipped
    steps, AMP, saving and loading. :class:`ZENITH` describes it all.

    A subclass checks its groups' options, and makes the update of one group in :meth:`_update`.
    """

    _buffers: ClassVar[tuple[str, ...]]
    """The state of a parameter that has its shape, the momentum first."""
    _absent: ClassVar[dict[str, Any]]
    """Options of ``torch.optim.SGD`` or ``AdamW`` that there aren't here, with the values at which those do the same.
    ``state_dict()`` has them, so that torch's classes can go on from it."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        window: int,
        min_ratio: float,
        record_after: int,
        half_life: int,
        norm_source: str,
        max_norm: float | None,
        clip: Callable[[list[Tensor]], object] | None,
        max_nonfinite_steps: int,
    ) -> None:
        require_history_options(window, min_ratio, record_after, half_life, max_nonfinite_steps)
        require(norm_source in _NORM_SOURCES, "norm_source", norm_source, f"one of {_NORM_SOURCES}")
        positive = max_norm is None or (is_real(max_norm) and 0 < max_norm < math.inf)
        require(positive, "max_norm", max_norm, "None or in (0, inf)")
        require(clip is None or callable(clip), "clip", clip, "None or a callable")
        require(clip is None or max_norm is None, "clip", clip, "None where max_norm is given")
        _refuse_part_of_zero()
        self.norm_source = norm_source
        self.max_norm = max_norm
        self.clip = clip
        self.max_nonfinite_steps = max_nonfinite_steps
        self._history = NormHistory(int(window), float(min_ratio), int(record_after), int(half_life))
        self._memo = _Memo(self)
        self._amp_scaling = defaults["fused"] is True
        self._check_group(defaults)
        super().__init__(params, {name: _plain(value) for name, value in defaults.items()})

    # The update.

    def _check_momentum(self, group: dict[str, Any]) -> None:
        """Raises ValueError for an option of the group's momentum that is out of its range."""
        raise NotImplementedError

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _update(self, group: dict[str, Any], batch: Batch, scalars: Scalars, *, fused: bool) -> None:
        """Updates one group's parameters, in place."""
        raise NotImplementedError

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its gradients join the norm, its ``lr`` and the rest default to the constructor's.

        Raises:
            ValueError: one of the group's options is out of its range, or can't differ between groups.
        """
        if isinstance(param_group, dict):
            take_history([param_group])  # of a group that was another optimizer's
            self._check_group({**self.defaults, **param_group})
            param_group = self._as_named_as_the_others(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in self.defaults:
            group[name] = _plain(group[name])
        self._refuse_flattened(group)
        keep_place(self.param_groups)

    def _as_named_as_the_others(self, group: dict[str, Any]) -> dict[str, Any]:
        """Gives names to a group without any, which torch refuses beside named ones (a project may add one)."""
        params = group.get("params")
        if "param_names" in group or not any("param_names" in other for other in self.param_groups):
            return group
        params = [params] if isinstance(params, Tensor) else params
        if isinstance(params, set) or not isinstance(params, Iterable):
            return group  # torch says what is wrong
        params = list(params)
        if not all(isinstance(param, Tensor) for param in params):
            return {**group, "params": params}
        number = len(self.param_groups)
        named = [(f"group {number}, parameter {place}", param) for place, param in enumerate(params)]
        return {**group, "params": named}

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in _OF_ALL_GROUPS:
            if name in group:
                raise ValueError(
                    f"{name} is one for all groups: give it to {self._kind()}, not to a group (got {group[name]!r})"
                )
        self._check_absent(group)
        lr, decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor):
            require(lr.numel() == 1, "lr", lr, "a float or a 1-element tensor (Tensor lr must be 1-element)")
            has_value = type(lr) in (Tensor, torch.nn.Parameter) and not lr.is_meta
            require(not has_value or 0 <= lr.item() < math.inf, "lr", lr, "in [0, inf)")
        else:
            require(is_real(lr) and 0 <= lr < math.inf, "lr", lr, "in [0, inf)")
        self._check_momentum(group)
        require(is_real(decay) and 0 <= decay < math.inf, "weight_decay", decay, "in [0, inf)")
        require(group["fused"] in (None, False, True), "fused", group["fused"], "None, False or True")

    def _check_absent(self, group: dict[str, Any]) -> None:
        for name, same in self._absent.items():
            value = _plain(group.get(name, same))
            if value != same and (value or same):
                raise ValueError(
                    f"{name} must be {same!r} or left out: {self._kind()} has none, got {value!r}"
                )

    def _kind(self) -> str:
        return next(c.__name__ for c in type(self).__mro__ if c.__module__.startswith("zenith_det.optim"))

    def _refuse_flattened(self, group: dict[str, Any]) -> None:
        """FSDP1's parameters are parts that say nothing of whose the others are."""
        if not _several_processes():
            return
        for param in group["params"]:
            if getattr(param, "_fsdp_flattened", False):
                raise ValueError(
                    f"{self._name(param, len(self.param_groups) - 1)} belongs to FullyShardedDataParallel (FSDP1): "
                    f"each rank would take the norm of its part for the whole. {self._kind()} works with FSDP2 "
                    "(torch.distributed.fsdp.fully_shard) and with DistributedDataParallel"
                )

    # One step.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # As in torch: with fused=True GradScaler leaves the gradients scaled and hands over grad_scale and found_inf
        # for step() to use on the device, instead of waiting for the device to tell whether step() is to be called.
        # Lightning refuses to clip the gradients of such an optimizer. A step of a subclass's own takes them for
        # unscaled.
        return self._amp_scaling and not hasattr(type(self).step, "measures_first")

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._amp_scaling = value

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A step of its own, such as those that clip first (Detectron2's maybe_add_gradient_clipping makes one), in
        # the class or in a base that is none of ours.
        owner = next(base for base in cls.__mro__ if "step" in vars(base))
        if owner is cls or not issubclass(owner, ZenithOptimizer):
            cls.step = _measured_first(cls.step)  # type: ignore[method-assign]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of all parameters that have a gradient.

        Args:
            closure: computes the loss again, gradients included; called once, first.

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

        memo = self._memo
        measured, memo.measured = memo.measured, None
        batches = self._batches()
        if not any(batch.params for batch in batches):
            return loss
        norm = measured if measured is not None else _grad_norm(batches)
        self._history.follow(norm)
        like = self._history.ratio

        # GradScaler sets these for the time of this call: gradients are still scaled then.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        divisor = None if grad_scale is None else as_scalar(grad_scale, like)
        norm = as_scalar(norm, like) if divisor is None else as_scalar(norm, like) / divisor
        finite = norm < math.inf  # False for NaN
        if found_inf is not None:
            finite = finite & (as_scalar(found_inf, like) == 0)
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
        memo.effective_lrs = [ratio * _lr(group, like) for group in self.param_groups]
        for group, batch, lr in zip(self.param_groups, batches, memo.effective_lrs):
            # A compiler fuses the plain operations itself, and can't look into the fused kernel.
            fused = group["fused"] is not False and not compiling
            self._update(group, batch, Scalars(lr, skip, divisor), fused=fused)

        if compiling:
            return loss
        memo.watch.look(self._history)
        if memo.streak.read(self._history.streak) >= self.max_nonfinite_steps:
            # GradScaler would take them away after the call; left, they would scale the next step's gradients.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            self._raise_nonfinite()
        return loss

    def _update_history(self, norm: Tensor, finite: Tensor, batches: list[Batch]) -> Tensor:
        """Gradient norm in, r_t out."""
        record = finite & trains(self.param_groups, norm)
        if self.norm_source == "gradient":
            return self._history.update(norm, record, norm, finite)
        velocity = as_scalar(global_norm(b for batch in batches for b in batch.bufs if b is not None), norm)
        record = finite & (velocity > 0) & (velocity < math.inf)
        return self._history.update(velocity, record, norm, finite)

    @torch.no_grad()
    def record_norm(self) -> Tensor:
        """Measures the norm of the gradients as they are now, for the next :meth:`step` to use as
        :math:`n_t`.

        For a trainer that clips (or changes) gradients itself before ``step()``: call it after the last
        ``backward()`` and before the clipping. Under AMP, call it after ``GradScaler.unscale_(optimizer)`` if
        you do unscale. ``zero_grad()`` and another ``backward()`` make it void: it isn't used for other gradients,
        should the step never come.

        Returns:
            The norm, 0-dim, on the device: ``torch.nn.utils.clip_grads_with_norm_`` can use it again.
        """
        batches = self._batches(bufs=False)
        self._memo.measured = norm = _grad_norm(batches)
        self._memo.void_after_backward(param for batch in batches for param in batch.params)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``; a norm that was recorded for a step that hasn't come is void."""
        self._memo.measured = None
        super().zero_grad(set_to_none)

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
        used = self._memo.effective_lrs
        ratio = self._history.ratio
        rest = [ratio * _lr(group, ratio) for group in self.param_groups[len(used) :]]
        return torch.stack(used + rest).tolist()  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        history = self._history
        options = {
            "window": history.window,
            "min_ratio": history.min_ratio,
            "record_after": history.record_after,
            "half_life": history.half_life,
            "norm_source": self.norm_source,
            "max_norm": self.max_norm,
            "clip": self.clip,
            "max_nonfinite_steps": self.max_nonfinite_steps,
        }
        lines = "".join(f"    {name}: {value}\n" for name, value in options.items())
        of_torch = super().__repr__().replace(f"    {_IN_EVERY_GROUP}: None\n", "")
        return of_torch.removesuffix(")") + f"All Groups\n{lines})"

    # Saving and loading.

    def reset_history(self, reason: str = "") -> None:
        """Forgets norms and zenith, and says so in the log: the ratio is 1 until W new norms are there.

        For a change that old norms mislead after, such as another global batch size: the noise in the norm
        depends on it.

        Args:
            reason: for the log line.
        """
        self._history.reset()
        self._memo.measured = None
        because = f" ({reason})" if reason else ""
        window = self._history.window
        logger.info("history starts again%s: the LR ratio is 1 until %d norms are recorded", because, window)

    def state_dict(self) -> dict[str, Any]:
        """The whole state: torch's layout, and the history under ``["param_groups"][0]["zenith"]``.

        ``torch.optim.SGD`` and ``torch.optim.AdamW`` find the options there that they want and ZENITH doesn't have.
        """
        with self._as_saved():
            return super().state_dict()

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """The groups as they are saved, so that torch's hooks see them whole."""
        groups = list(self.param_groups)
        extra = _WITHOUT_EFFECT | self._absent
        try:
            self.param_groups[:] = [{**extra, **group} for group in groups]
            put_history(self.param_groups, self._history)
            yield
        finally:
            self.param_groups[:] = groups

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned; training continues bit for bit.

        ``window`` and the other options that are the same for all groups stay the constructor's. With another
        window the newest norms that fit are kept; into a longer one the last ratio holds until it is full.

        The states of ``torch.optim.SGD`` and ``AdamW`` are loaded too. Without a history, or with
        that of a ratio over neither of them, the history starts empty, with a warning. Between SGD's kind and
        AdamW's, the options of the groups stay the constructor's, as an LR of one is no LR for the other. Momentum
        starts empty then; the history is kept.

        Raises:
            ValueError: the groups don't match, a momentum buffer doesn't have its parameter's shape, or the state's
                optimizer had an option that this one doesn't have.
        """
        super().load_state_dict(state_dict)

    def _load(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        """What torch's ``load_state_dict()`` hands over: everything of the state, by parameter."""
        history = take_history(groups)
        params = [param for group in groups for param in group["params"]]
        if kind_of_state(groups) in (self._buffers[0], None):
            for own, loaded in zip(self.param_groups, groups):
                self._check_absent(loaded)
                for name in _WITHOUT_EFFECT.keys() | self._absent.keys():
                    loaded.pop(name, None)
                for name in own.keys() & self.defaults.keys():
                    loaded[name] = _plain(loaded.get(name, own[name]))
                self._check_momentum(loaded)
        else:
            logger.warning(
                "the loaded optimizer state is of another kind than %s: momentum starts again; lr, weight_decay and "
                "the groups' other options stay as they are",
                type(self).__name__,
            )
            for param in params:
                state.pop(param, None)
            groups = [dict(own) for own in self.param_groups]
        for index, group in enumerate(groups):
            for param in group["params"]:
                self._check_state(param, state.get(param, {}), index)

        # In place: a wrapper that imitates this class would keep what is set on it.
        self.state.clear()
        self.state.update(state)
        self.param_groups[:] = groups
        keep_place(self.param_groups)
        self._memo.reset()
        if history is not None:
            self._history.load_state_dict(history)
        else:
            logger.warning("the loaded optimizer state has no ZENITH history: is it another optimizer's?")
            self.reset_history("none was loaded")

    def _check_state(self, param: Tensor, state: dict[str, Any], index: int) -> None:
        """Refuses what torch would load, and fail over (or not) in the next step."""
        for name in self._buffers:
            buf = state.get(name)
            if buf is not None and buf.shape != param.shape:
                raise ValueError(
                    f"loaded {name} of {self._name(param, index)} has shape {tuple(buf.shape)}, "
                    f"the parameter {tuple(param.shape)}: is the state of another model?"
                )

    def __getstate__(self) -> dict[str, Any]:
        own = ("norm_source", "max_norm", "clip", "max_nonfinite_steps", "_amp_scaling", "_history")
        memo = {"_measured": self._memo.measured, "_effective_lrs": self._memo.effective_lrs}
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, **memo}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.keys() == {"state", "param_groups"}:  # from load_state_dict()
            self._load(state["state"], state["param_groups"])
            return
        state = dict(state)
        measured, effective_lrs = state.pop("_measured"), state.pop("_effective_lrs")
        self._amp_scaling = False  # in a pickle from before there was one
        super().__setstate__(state)
        self._memo = _Memo(self)
        self._memo.measured, self._memo.effective_lrs = measured, effective_lrs
        keep_place(self.param_groups)

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


class _Memo:
    """What passes from one call of the optimizer to the next.

    One object that stays the same: a wrapper that imitates the optimizer's class (Lightning's, Fabric's) reads its
    attributes, but would keep for itself what a method sets on ``self``.
    """

    def __init__(self, owner: ZenithOptimizer) -> None:
        self.owner = weakref.ref(owner)
        self._told_of_backward: set[int] = set()
        self.reset()

    def reset(self) -> None:
        self.measured: Tensor | None = None
        """The norm that :meth:`ZenithOptimizer.record_norm` took for the next step."""
        self.effective_lrs: list[Tensor] = []
        self.streak = StreakReader()
        self.watch = HistoryWatch()

    def void_after_backward(self, params: Iterator[Tensor]) -> None:
        """Forgets the measured norm as soon as one of ``params`` gets another gradient."""
        this = weakref.ref(self)

        def void(_: Tensor) -> None:
            memo = this()
            if memo is not None:
                memo.measured = None

        for param in params:
            if id(param) not in self._told_of_backward and param.is_leaf and param.requires_grad:
                self._told_of_backward.add(id(param))
                param.register_post_accumulate_grad_hook(void)


def _measured_first(step: Callable[..., Any]) -> Callable[..., Any]:
    """A subclass's ``step`` that may clip before it calls ours: the norm is taken before it does."""

    @functools.wraps(step)
    def measured_step(
        self: ZenithOptimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        def measure() -> None:
            # Not again where an outer class or the trainer did. A wrapper that imitates the class doesn't clip, but
            # its gradients may still have to be unscaled.
            if self._memo.measured is None and self._memo.owner() is self:
                self.record_norm()

        if closure is None:
            measure()
            return step(self, closure, *args, **kwargs)

        def measured_closure() -> Any:
            loss = closure()
            measure()
            return loss

        return step(self, measured_closure, *args, **kwargs)

    measured_step.measures_first = True  # type: ignore[attr-defined]
    return measured_step


def require_history_options(
    window: object, min_ratio: Any, record_after: object, half_life: object, max_nonfinite_steps: object
) -> None:
    """Raises ValueError for an option that is out of its range."""
    require(is_integer(window, least=1), "window", window, "an integer >= 1")
    require(is_real(min_ratio) and 0 <= min_ratio <= 1, "min_ratio", min_ratio, "in [0, 1]")
    require(is_integer(record_after, least=0), "record_after", record_after, "an integer >= 0")
    require(is_integer(half_life, least=0), "half_life", half_life, "an integer >= 0")
    limit = max_nonfinite_steps
    require(is_integer(limit, least=1), "max_nonfinite_steps", limit, "an integer >= 1")


def put_history(groups: list[dict[str, Any]], history: NormHistory) -> None:
    """Puts ``history`` into groups that are to be saved."""
    tensors = history.state_dict()
    for group in groups:
        group[_IN_EVERY_GROUP] = tensors
    groups[0][HISTORY_KEY] = tensors


def take_history(groups: list[dict[str, Any]]) -> dict[str, Tensor] | None:
    """Takes out of groups what :func:`put_history` may have put there."""
    found = [group.pop(key, None) for key in (HISTORY_KEY, _IN_EVERY_GROUP) for group in groups]
    return next((history for history in found if history), None)


def keep_place(groups: list[dict[str, Any]]) -> None:
    """Lets torch.distributed.checkpoint see that groups are saved with a history."""
    groups[0][_IN_EVERY_GROUP] = None


def has_history(groups: list[dict[str, Any]]) -> bool:
    return any(group.get(HISTORY_KEY) or group.get(_IN_EVERY_GROUP) for group in groups)


def kind_of_state(groups: list[dict[str, Any]]) -> str | None:
    """The momentum that the optimizer had whose ``state_dict()`` has these groups: ``"momentum_buffer"`` (SGD, ZENITH),
    ``"exp_avg"`` (AdamW, ZENITHAdamW), or None if it was neither."""
    if any("amsgrad" in group or ("betas" in group and "momentum" not in group) for group in groups):
        return "exp_avg"
    return "momentum_buffer" if any("momentum" in group for group in groups) else None


def trains(param_groups: list[dict[str, Any]], norm: Tensor) -> Tensor | bool:
    """False where torch.distributed.checkpoint steps with lr 0 and zero gradients, to see the state."""
    lrs = [group["lr"] for group in param_groups]
    if not all(isinstance(lr, Tensor) or lr == 0 for lr in lrs):
        return True
    training = norm > 0
    for lr in lrs:
        if isinstance(lr, Tensor):
            training = training | (as_scalar(lr, norm) != 0)
    return training


def as_scalar(value: Tensor, like: Tensor) -> Tensor:
    """``value`` (1 element) as a 0-dim tensor of the type and on the device of ``like``."""
    return value.reshape(()).to(like.device, like.dtype, non_blocking=not like.is_cpu)


def _grad_norm(batches: list[Batch]) -> Tensor:
    return global_norm(grad for batch in batches for grad in batch.grads)


def _lr(group: dict[str, Any], like: Tensor) -> float | Tensor:
    lr: float | Tensor = group["lr"]
    return as_scalar(lr, like) if isinstance(lr, Tensor) else lr


def _plain(value: Any) -> Any:
    """A NumPy number would keep a checkpoint from loading, a list or an array isn't what torch's classes have."""
    if is_real(value):
        return float(value)
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _refuse_part_of_zero() -> None:
    """ZeroRedundancyOptimizer makes each rank an optimizer of some of the parameters, which can't know of the rest."""
    if not _several_processes():
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            raise ValueError(
                "ZENITH in ZeroRedundancyOptimizer would take the norm of each rank's part for the whole: put the "
                "ratio over it, ZenithRatio(ZeroRedundancyOptimizer(params, torch.optim.SGD, ...)), or use FSDP2 "
                "(torch.distributed.fsdp.fully_shard)"
            )
        frame = frame.f_back
