"""Three processes sum gradients in the same order, whenever they started."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zenith_det.training.processes.ddp import settle_buckets
from zenith_det.training.processes.distributed import barrier, get_rank
from zenith_det.training.processes.launching import launch


class Backwards(nn.Module):
    """Used in another order than registered, so that DDP orders its buckets anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(6))

    def forward(self, images: Tensor) -> Tensor:
        for layer in [*self.layers[3:], *self.layers[:3]]:
            images = layer(images).tanh()
        return images.square().mean()


def train(folder: str, start: int, stop: int, settle: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = Backwards()
    if start:
        model.load_state_dict(torch.load(Path(folder, f"{start}.pth")))
    parallel = DistributedDataParallel(model)
    if settle:
        settle_buckets(parallel)
        assert all(parameter.grad is None for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for iteration in range(start, stop):
        generator = torch.Generator().manual_seed(10 * iteration + get_rank())
        optimizer.zero_grad()
        parallel(torch.randn(8, 96, generator=generator)).backward()
        optimizer.step()
    if get_rank() == 0:
        torch.save(model.state_dict(), Path(folder, f"{stop}.pth"))


def train_twice(whole: str, halves: str, settle: bool) -> None:
    """4 iterations in one go, and in two; each begins with a DDP of its own, as a process would."""
    for folder, start, stop in ((whole, 0, 4), (halves, 0, 2), (halves, 2, 4)):
        train(folder, start, stop, settle)
        barrier()  # the others read what the first writes


def weights(folder: Path, settle: bool) -> tuple[Tensor, Tensor]:
    runs = [folder / f"whole{settle}", folder / f"halves{settle}"]
    for run in runs:
        run.mkdir()
    launch(train_twice, 3, args=(*map(str, runs), settle), device="cpu")
    whole, halves = (torch.cat([w.flatten() for w in torch.load(run / "4.pth").values()]) for run in runs)
    return whole, halves


@pytest.mark.slow
def test_a_resumed_run_of_three_processes_is_bit_equal(tmp_path: Path) -> None:
    assert torch.equal(*weights(tmp_path, settle=True))
    assert not torch.equal(*weights(tmp_path, settle=False)), (
        "DDP settles by itself now: settle_buckets can go"
    )


def test_one_process_and_plain_models_are_left_alone() -> None:
    model = Backwards()
    settle_buckets(model)
    assert all(parameter.grad is None for parameter in model.parameters())
