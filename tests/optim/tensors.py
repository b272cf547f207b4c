"""Tensors in every order of memory, and how much memory a state takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "with gaps": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
}


def memory_of(value: Any) -> int:
    """The bytes of all tensors in dicts and lists of any depth; one that is there twice counts once, as in a file."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in _tensors_in(value)}.values())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in values:
        yield from _tensors_in(one)
