"""ZENITH and what it is made of. Needs torch alone: usable in any training loop, detection or not."""

from __future__ import annotations

from ._norm import global_norm
from .loading import accept_other_states
from .raw_norm import measure_after_backward
from .zenith import ZENITH
from .zenith_adamw import ZENITHAdamW
from .zenith_ratio import ZenithRatio, zenith_of

__all__ = [
    "ZENITH",
    "ZENITHAdamW",
    "ZenithRatio",
    "accept_other_states",
    "global_norm",
    "measure_after_backward",
    "zenith_of",
]
