"""The processes of one run, forked after the imports, with the environment that ``torchrun`` would give them."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.distributed as dist

from tests.reliability.kill_runs import exit_code, fork


def ranks(processes: int, run: Callable[[], int | None]) -> int | None:
    """``run()`` here, or as each of several ranks; the exit code, of the first rank whose code isn't 0."""
    if processes == 1:
        return run()
    # Kept by this process, as torchrun's agent does, so that it outlives the first rank to end.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def rank(number: int) -> int | None:
        size = str(processes)
        os.environ.update(
            RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True",
        )  # fmt: skip
        return run()

    children = [fork(lambda number=number: rank(number)) for number in range(processes)]
    codes = [exit_code(child) for child in children]
    return next((code for code in codes if code), 0)
