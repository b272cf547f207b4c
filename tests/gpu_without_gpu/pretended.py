"""A CUDA device that isn't there: tensors that say ``cuda:0`` and are computed by the CPU's kernels.

A wrapper subclass holds a CPU tensor and reports the device; a dispatch mode sees every operation, so that also what a
factory makes on "cuda" is wrapped. Two things are looked at on the way: tensors of both devices in one operation, an
error as on a GPU, and whatever the host would wait for, which :data:`WAITS` counts by kind and line.

It knows what the training loops use and no more. :func:`install` comes before anything else asks torch for a device.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

CUDA = torch.device("cuda:0")
#: (kind, file:line) of what the host waited for while :func:`counting`.
WAITS: Counter[tuple[str, str]] = Counter()
#: Operations on the device while :func:`counting`.
OPERATIONS: Counter[str] = Counter()

_counting = False
_raising = False
_waited = 0
#: (target, values) of copies to the host that are still on their way.
_late: list[tuple[torch.Tensor, torch.Tensor]] = []
#: Kept alive: another tensor may not come to lie at the same address.
_pinned: dict[int, torch.UntypedStorage] = {}
_INDEXING = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::_unsafe_index_put",
}  # fmt: skip
# Their results' sizes or values are known to the device alone.
_READ_BACK = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::item", "torchvision::nms", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
}  # fmt: skip
# They take no number of the host's among the device's tensors.
_STRICT = ("torchvision::", "aten::_fused", "aten::_foreach")
_STRICT_NAMES = {"aten::cat", "aten::stack", "aten::mm", "aten::addmm", "aten::convolution"}


class DevicesMixedError(RuntimeError):
    """One operation was given tensors of the CPU and of the device."""


class Pretended(torch.Tensor):
    """A tensor of the device; ``elem`` is the CPU's that holds its values."""

    elem: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=CUDA,
        )  # fmt: skip
        made.elem = elem
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        copy = memo[id(self)] = Pretended(self.elem.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):  # by which torch tells a parameter of such a class
            copy._is_param = True
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:  # a checkpoint holds it as a CPU tensor
        return self.elem.detach().__reduce_ex__(protocol)

    # By these ``Module.to`` tells that a parameter must be swapped, as it can't take such a tensor's storage.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["elem"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *rest: Any) -> Pretended:
        return Pretended(inner["elem"])

    def tolist(self) -> Any:
        _wait("tolist")
        return self.elem.tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def record_stream(self, stream: Any) -> None:
        pass

    # A wrapper's sizes don't change in place.
    def unsqueeze_(self, dim: int) -> torch.Tensor:
        return self.unsqueeze(dim)

    def __repr__(self, **options: Any) -> str:
        return f"Pretended({self.elem.detach()!r})"


class _Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _line() -> str:
    """The innermost line outside torch, and the innermost of this project where that is another."""
    frames = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
    ours = [f for f in frames if "/zenith_det/" in f.filename]
    lines = [f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in frames[-1:] + ours[-1:]]
    return " < ".join(dict.fromkeys(lines))


def _set_sync_debug_mode(mode: str) -> None:
    global _raising
    _raising = mode == "error"


def _wait(kind: str) -> None:
    global _waited
    if _raising:
        raise RuntimeError(f"called a synchronizing CUDA operation: {kind} at {_line()}")
    _waited += 1
    for target, values in _late:
        target.copy_(values)
    _late.clear()
    if _counting:
        WAITS[kind, _line()] += 1


def _send(target: torch.Tensor, values: torch.Tensor) -> None:
    """Bring ``values`` into pinned memory, where who doesn't wait for them finds none."""
    target.fill_(torch.nan if target.is_floating_point() else torch.iinfo(target.dtype).min)
    _late.append((target, values.clone()))


def _note_pinned(tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    _pinned[storage.data_ptr()] = storage


def _is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in _pinned


def _copied(name: str, args: Any, kwargs: Any, to_device: bool) -> bool:
    """Wait for a copy, unless it is one between pinned memory and the device, which goes on by itself.

    Returns:
        Whether it is to the host, and goes on.
    """
    if name == "aten::copy_":
        target, source = args[:2]
        asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if isinstance(target, Pretended) == isinstance(source, Pretended):
            return False
        host = source if isinstance(target, Pretended) else target
    else:
        host, asynchronous = args[0], kwargs.get("non_blocking", False)
        if isinstance(host, Pretended):
            if kwargs.get("device") is not None and not to_device:
                _wait("copy to the host")
            return False
        if not to_device:
            return False
    if asynchronous and _is_pinned(host):
        return name == "aten::copy_" and host is args[0]
    _wait("copy of unpinned memory" if asynchronous else "blocking copy")
    return False


def _indexed(name: str, args: Any) -> None:
    target, indices = args[:2]
    given = [i for i in indices if i is not None]
    put = "put" in name
    if put and (not isinstance(target, Pretended) or (args[2].dim() and not isinstance(args[2], Pretended))):
        raise DevicesMixedError(f"{name} at {_line()}")
    if not isinstance(target, Pretended):
        raise DevicesMixedError(f"{name}: indices on cuda, tensor on cpu at {_line()}")
    # One mask and one number of the host's: masked_fill, which waits for nothing.
    fill = put and args[2].numel() == 1 and not isinstance(args[2], Pretended) and len(given) == 1
    for index in given:
        if index.dtype in (torch.bool, torch.uint8) and not fill:
            _wait("boolean index")
        if not isinstance(index, Pretended):
            _wait("index on the host")


def _check_devices(name: str, args: Any, host: list[torch.Tensor]) -> None:
    """A 0-dim CPU tensor may stand for a number, in most operations; no other CPU tensor may."""
    scalars_allowed = not (name.startswith(_STRICT) or name in _STRICT_NAMES) or name.startswith(
        "aten::_foreach"
    )
    wrong = [t for t in host if t.dim() or not scalars_allowed]
    if name.endswith("_") and isinstance(args[0], torch.Tensor) and not isinstance(args[0], Pretended):
        wrong = host
    if wrong:
        raise DevicesMixedError(f"{name}: cuda and cpu {[tuple(t.shape) for t in wrong]} at {_line()}")


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    flat, spec = tree_flatten((args, kwargs))
    ours = [t for t in flat if isinstance(t, Pretended)]
    host = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, Pretended)]
    device = kwargs.get("device")
    to_device = device is not None and torch.device(device).type == "cuda"
    if name == "aten::is_pinned":
        return not ours and _is_pinned(args[0])
    pin = kwargs.get("pin_memory")
    if not ours and not to_device:
        made = func(*args, **{k: v for k, v in kwargs.items() if k != "pin_memory" or not pin})
        if pin:
            _note_pinned(made)
        return made
    if _counting:
        OPERATIONS[name] += 1
    if name in ("aten::copy_", "aten::_to_copy"):
        if _copied(name, args, kwargs, to_device):
            _send(args[0], args[1].elem)
            return args[0]
    elif name in _INDEXING:
        _indexed(name, args)
    elif name in _READ_BACK or (name == "aten::repeat_interleave" and "output_size" not in kwargs):
        _wait(name)
    elif host and ours:
        _check_devices(name, args, host)

    plain, options = tree_unflatten([t.elem if isinstance(t, Pretended) else t for t in flat], spec)
    if to_device:
        options = {**options, "device": torch.device("cpu")}
    options.pop("pin_memory", None)
    result = func(*plain, **options)
    to_host = device is not None and not to_device
    if to_host and pin:
        _note_pinned(result)
    if to_host or name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"):
        return result.clone() if result is plain[0] else result
    if name == "aten::copy_" and not isinstance(args[0], Pretended):
        return args[0]
    # What an operation in place returns is the tensor that it was given.
    known = {id(t.elem): t for t in ours} | {id(t): t for t in host}
    out, out_spec = tree_flatten(result)
    return tree_unflatten(
        [
            known.get(id(o)) if id(o) in known else Pretended(o) if isinstance(o, torch.Tensor) else o
            for o in out
        ],
        out_spec,
    )


class _Stream:
    cuda_stream = stream_id = 0
    device = CUDA

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        _wait("Stream.synchronize")


class _Event:
    """It has passed once the host has waited for anything that came after it."""

    def __init__(self, **options: Any) -> None:
        self._recorded = -1

    def record(self, stream: Any = None) -> None:
        self._recorded = _waited

    def query(self) -> bool:
        return self._recorded < _waited

    def synchronize(self) -> None:
        if not self.query():
            _wait("Event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Count waits and operations."""
    global _counting
    _counting = True
    try:
        yield
    finally:
        _counting = False


def _pin(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    copy = self.clone()
    _note_pinned(copy)
    return copy


def install() -> None:
    """Give this process its device, for good. Needs the two stubs of this folder loaded."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_multithreading_enabled(False)
    stream = _Stream()
    answers: dict[str, Any] = {
        "_lazy_init": None, "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "set_device": None, "current_stream": stream, "default_stream": stream, "is_current_stream_capturing": False,
        "get_device_name": "Pretended GPU", "get_device_capability": (9, 0), "is_bf16_supported": True,
        "manual_seed": None, "manual_seed_all": None, "set_rng_state": None, "max_memory_allocated": 0,
        "memory_allocated": 0, "memory_reserved": 0, "mem_get_info": (8 * 10**9, 8 * 10**9), "empty_cache": None,
        "reset_peak_memory_stats": None, "_sleep": None,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: _wait("cuda.synchronize")  # type: ignore[assignment]
    torch.cuda.set_sync_debug_mode = _set_sync_debug_mode  # type: ignore[assignment]
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event  # type: ignore[assignment,misc]
    torch.cuda.stream = torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.Tensor.pin_memory = _pin  # type: ignore[assignment,method-assign]
    torch.Tensor.is_pinned = lambda self, device=None: _is_pinned(self)  # type: ignore[assignment,method-assign]
    torch.backends.cudnn.enabled = False  # its batch norm has no kernel for the CPU
    torch._C._set_only_lift_cpu_tensors(True)
    _Everywhere().__enter__()
