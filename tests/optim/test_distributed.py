"""Two processes over gloo: DDP needs no communication for the ratio, sharded parameters one scalar."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zenith_det.optim import ZENITH, ZENITHAdamW, global_norm

dist = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "window": 4, "max_norm": 2.0}
ADAMW_OPTIONS: dict[str, Any] = {"lr": 0.02, "eps": 1e-3, "window": 4, "max_norm": 2.0}


def build() -> nn.Module:
    torch.manual_seed(0)
    # 5 rows on 2 ranks: shards of unequal size
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def batch(t: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(t))


def train(model: nn.Module, optimizer: ZENITH, rank: int, size: int, steps: range) -> list[float]:
    ratios = []
    for t in steps:
        optimizer.zero_grad()
        model(batch(t).chunk(size)[rank]).square().mean().backward()
        optimizer.step()
        ratios.append(float(optimizer.zenith_state()["ratio"]))
    return ratios


def ddp(rank: int) -> None:
    model = build()
    ddp_model = nn.parallel.DistributedDataParallel(model)
    optimizer = ZENITH(model.parameters(), **OPTIONS)
    ratios = train(ddp_model, optimizer, rank, 2, range(20))

    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, ratios)
    assert gathered[0] == gathered[1], "the ranks' ratios differ"

    alone = build()
    expected = train(alone, ZENITH(alone.parameters(), **OPTIONS), 0, 1, range(20))
    assert ratios == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.95

    if rank == 0:  # no communication: a step that one rank takes alone does not wait for the other
        optimizer.step()


def norm_of_dtensors(rank: int) -> None:
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(5, 3), torch.randn(4), torch.randn(1, 7), torch.randn(6)]
    placed = [
        distribute_tensor(whole[0], mesh, [Shard(0)]),
        distribute_tensor(whole[1], mesh, [Replicate()]),
        distribute_tensor(whole[2], mesh, [Shard(0)]),  # nothing on rank 1
        whole[3],  # no DTensor
    ]
    parts = [torch.randn(3) for _ in range(2)]
    placed.append(DTensor.from_local(parts[rank], mesh, [Partial()]))
    whole.append(parts[0] + parts[1])
    assert float(global_norm(placed)) == pytest.approx(float(global_norm(whole)), rel=1e-6)


def fsdp(rank: int) -> None:
    sharded_training(rank, ZENITH, OPTIONS)


def fsdp_adamw(rank: int) -> None:
    sharded_training(rank, ZENITHAdamW, ADAMW_OPTIONS)


def sharded_training(rank: int, kind: type[ZENITH | ZENITHAdamW], options: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))

    def sharded() -> nn.Module:
        model = build()
        fully_shard(model[0], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model, alone = sharded(), build()
    optimizer = kind(model.named_parameters(), **options)
    reference = kind(alone.named_parameters(), **options)
    ratios = train(model, optimizer, rank, 2, range(20))
    expected = train(alone, reference, 0, 1, range(20))
    assert ratios == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.95

    def same() -> None:
        for p, q in zip(model.parameters(), alone.parameters()):
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]

    same()

    # torch.distributed.checkpoint carries the whole state over, history included.
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    again = kind(model.named_parameters(), **options)
    set_optimizer_state_dict(model, again, state)
    assert again.zenith_state() == optimizer.zenith_state()
    optimizer = again
    assert train(model, optimizer, rank, 2, range(20, 30)) == pytest.approx(
        train(alone, reference, 0, 1, range(20, 30)), rel=1e-5
    )
    same()

    # A NaN that only one rank holds is a skipped step on both.
    before = [p.full_tensor().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    if rank == 1:
        next(model.parameters()).grad.to_local().fill_(math.nan)  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.zenith_state()["skipped_steps"] == 1
    for p, old in zip(model.parameters(), before):
        assert torch.equal(p.full_tensor(), old)  # type: ignore[attr-defined]


def worker(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=90),
    )
    try:
        for name in names:
            part: Callable[[int], None] = globals()[name]
            part(rank)
            print(f"{name} passed on rank {rank}", flush=True)
            dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "names", [["ddp"], ["norm_of_dtensors", "fsdp", "fsdp_adamw"]], ids=["DDP", "sharded parameters"]
)
def test_two_processes(names: list[str], tmp_path: Path) -> None:
    if "fsdp" in names and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 runs on the CPU from torch 2.7 on")
    torch.multiprocessing.spawn(worker, args=(str(tmp_path), names), nprocs=2)
