"""The training losses on images that are not trained on, without a trace in what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zenith_det.training.course.seeding import derived_seed, seeded
from zenith_det.training.failures.out_of_memory import telling_of_memory
from zenith_det.training.processes.agreement import agreeing
from zenith_det.training.processes.distributed import all_gather_objects

#: What the scalars are logged under: ``validation/total_loss``, ``validation/loss_cls`` …
PREFIX = "validation/"


def without_augmentation(cfg: Any) -> Any:
    """A copy of the configuration whose training images are as evaluation has them."""
    still = cfg.clone()
    still.defrost()
    still.INPUT.MIN_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,)
    still.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"  # a range is of two sizes
    still.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    still.INPUT.RANDOM_FLIP = "none"
    still.INPUT.CROP.ENABLED = False
    still.INPUT.AUGMENTATIONS = []
    return still


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    seed: int,
    should_stop: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """The mean of each loss over ``batches`` of all ranks, and their total.

    Norm layers use their running statistics and keep them. Which proposals and anchors are sampled is drawn
    from ``seed`` and the batch's number alone, so that two evaluations differ by the weights, not by luck;
    torch's, numpy's and Python's random states are afterwards what they were.

    Args:
        model: not wrapped by DDP; called with a batch it returns a dict of scalar losses when it trains.
        batches: this rank's, of one image each.
        should_stop: asked after each; anything but 0 breaks off.

    Returns:
        ``validation/total_loss`` and ``validation/`` + each loss; empty where there was no batch.

    Raises:
        EvaluationStopped, AgreedError: see :func:`~zenith_det.training.processes.agreement.agreeing`.
    """
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    count = 0
    with _as_in_training(model), _kept_random_state(device), agreeing(should_stop):
        for number, batch in enumerate(batches):
            _seed_device(device, derived_seed(seed, number))
            with telling_of_memory("validation loss", batch, device, training=False):
                losses = model(batch)
            for name, loss in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + loss.detach().float()
            count += 1
            if should_stop():
                break
    mine = {name: float(total) for name, total in sums.items()}
    ranks = all_gather_objects((mine, count))
    images = sum(n for _, n in ranks)
    if not images:
        return {}
    names = list(dict.fromkeys(name for losses, _ in ranks for name in losses))
    means = {name: sum(losses.get(name, 0.0) for losses, _ in ranks) / images for name in names}
    return {f"{PREFIX}total_loss": sum(means.values())} | {
        f"{PREFIX}{name}": mean for name, mean in means.items()
    }


@contextlib.contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode, since only there a detector returns losses, but for layers that would learn from it."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            module.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), seeded(0):
        yield


def _seed_device(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
