"""Tensors in every order of memory, and how much memory a state takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "with gaps": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
}


def memory_of(value: Any) -> int:
    """The bytes of all tensors in dicts and lists of any depth."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(memory_of, values))
