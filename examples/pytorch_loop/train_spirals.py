"""ZENITH alone, in a plain PyTorch loop: three spirals told apart by a small network, in seconds on a CPU.

    python examples/pytorch_loop/train_spirals.py

Prints the learning rate as it goes (no schedule and no length of training was given), and the accuracy.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from zenith_det.optim import ZENITH


def spirals(points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``points`` points (N, 2) on three noisy spirals, and which of the three each is on (N,)."""
    arm = torch.randint(3, (points,), generator=generator)
    radius = torch.rand(points, generator=generator).sqrt()
    angle = 4 * radius + 2 * torch.pi / 3 * arm + 0.15 * torch.randn(points, generator=generator)
    return radius[:, None] * torch.stack((angle.cos(), angle.sin()), dim=1), arm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=0.3, help="the LR to start with; ZENITH lowers it")
    parser.add_argument("--window", type=int, default=100, help="norms in the mean, in steps")
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train_x, train_y = spirals(2000, generator)
    test_x, test_y = spirals(1000, generator)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = ZENITH(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4, window=args.window)

    print("step   loss    LR        ratio   gradient norm (mean, zenith)")
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(train_x), (128,), generator=generator)
        loss = nn.functional.cross_entropy(model(train_x[rows]), train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 100 == 0:
            lr, state = optimizer.effective_lrs()[0], optimizer.zenith_state()
            mean, zenith = state["window_mean"], state["zenith"]
            print(f"{step:5d}  {loss:.4f}  {lr:.6f}  {state['ratio']:.4f}  {mean:.4f}, {zenith:.4f}")

    with torch.no_grad():
        accuracy = (model(test_x).argmax(dim=1) == test_y).float().mean()
    print(f"accuracy on new points: {accuracy:.1%}")


if __name__ == "__main__":
    main()
