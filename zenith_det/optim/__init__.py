"""ZENITH and what it is made of. Needs torch alone: usable in any training loop, detection or not."""

from __future__ import annotations

from ._norm import global_norm
from .zenith import ZENITH
from .zenith_adamw import ZENITHAdamW
from .zenith_ratio import ZenithRatio, zenith_of

__all__ = ["ZENITH", "ZENITHAdamW", "ZenithRatio", "global_norm", "zenith_of"]
