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


def train_twice(root: str) -> None:
    """4 iterations in one go, and in two; each begins with a DDP of its own, as a process would."""
    for settle in (True, False):
        for run, start, stop in (("whole", 0, 4), ("halves", 0, 2), ("halves", 2, 4)):
            train(f"{root}/{run}{settle}", start, stop, settle)
            barrier()  # the others read what the first writes


@pytest.mark.slow
def test_a_resumed_run_of_three_processes_is_bit_equal(tmp_path: Path) -> None:
    ends = {}
    for name in ("wholeTrue", "halvesTrue", "wholeFalse", "halvesFalse"):
        (tmp_path / name).mkdir()
    launch(train_twice, 3, args=(str(tmp_path),), device="cpu")
    for folder in tmp_path.iterdir():
        ends[folder.name] = torch.cat([w.flatten() for w in torch.load(folder / "4.pth").values()])
    assert torch.equal(ends["wholeTrue"], ends["halvesTrue"])
    assert not torch.equal(ends["wholeFalse"], ends["halvesFalse"]), (
        "DDP settles by itself now: settle_buckets can go"
    )


def test_one_process_and_plain_models_are_left_alone() -> None:
    model = Backwards()
    settle_buckets(model)
    assert all(parameter.grad is None for parameter in model.parameters())
