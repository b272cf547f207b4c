"""Random numbers as pure functions of the run's seed and a position, so that no random state needs saving."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from zenith_det.training.processes.distributed import get_rank


def derived_seed(*numbers: int) -> int:
    """A seed in [0, 2^63) that depends on every one of ``numbers`` and on their order.

    Neighbouring numbers give unrelated seeds, on every machine the same.
    """
    digest = hashlib.blake2b(repr(tuple(map(int, numbers))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Seed torch (all devices), numpy and Python's ``random``."""
    torch.manual_seed(seed)
    _seed_numpy_and_python(seed)


def seed_step(seed: int, iteration: int) -> None:
    """Seed everything for one iteration of this rank: a resumed run draws what the whole run draws there.

    Args:
        seed: of the run.
        iteration: counted from 0.
    """
    seed_all(derived_seed(seed, iteration, get_rank()))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, torch's CPU generator, numpy and Python's ``random`` start from ``seed``.

    Afterwards they go on as if nothing had been drawn. Generators of GPUs are left alone.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch_state = torch.default_generator.get_state()
    # Not torch.manual_seed: that would seed the GPUs', too.
    torch.default_generator.manual_seed(seed)
    _seed_numpy_and_python(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _seed_numpy_and_python(seed: int) -> None:
    np.random.seed(seed % 2**32)
    random.seed(seed)
