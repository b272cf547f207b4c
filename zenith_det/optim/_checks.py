"""Refusals of values: the argument, what is allowed, what was given."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

__all__ = ["is_integer", "is_real", "require"]


def is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raises ValueError: ``name`` must be ``allowed``, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
