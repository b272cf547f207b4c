"""How fast the built-in engine's loader gives batches, and how long training waits for them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from zenith_det.benchmarking.loops import generated_images, images_per_second, loaded_config
from zenith_det.benchmarking.measuring import Case, Samples, interleave
from zenith_det.benchmarking.reporting import Comparison, Ratio
from zenith_det.engines.engine import load_engine
from zenith_det.engines.probe import make_trainer
from zenith_det.engines.trainer import Trainer

__all__ = ["compare_loading"]


def compare_loading(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    workers: Sequence[int],
    batch_size: int,
    size: int,
    rounds: int,
    warmup: int,
    device: torch.device,
) -> Comparison:
    """Batches from the loader alone, then training on them, for each number of worker processes.

    Loaders run one after the other: their workers would otherwise take the cores from one another. "waiting"
    is the share of an iteration in which the model has no batch yet.
    """
    samples: dict[str, Samples] = {}
    waiting: dict[str, float] = {}
    with generated_images(config_file, opts, 8 * batch_size, size) as (images, folder):
        for number in workers:
            extra = [*opts, "DATALOADER.NUM_WORKERS", str(number)]
            loaded = loaded_config(config_file, extra, images, folder / str(number), batch_size, size, device)
            trainer = make_trainer(load_engine("torchvision"), loaded)
            loading = Case(f"loading, {number} workers", trainer.batches.__next__)
            samples |= interleave([loading], rounds=rounds, warmup=warmup)
            training = f"training, {number} workers"
            samples |= interleave(
                [Case(training, trainer.iterate)], rounds=rounds, warmup=warmup, device=device
            )
            waiting[training] = waiting_share(trainer, rounds)
    columns = images_per_second(samples, batch_size)
    for name, share in waiting.items():
        columns[name]["waiting"] = f"{share:.1%}"
    first = f"loading, {workers[0]} workers"
    ratios = [Ratio(f"loading, {number} workers", first) for number in workers[1:]]
    title = f"data: {config_file}, {batch_size} images of {size} pixels, {device}"
    return Comparison(title, samples, ratios, columns)


def waiting_share(trainer: Trainer, last: int) -> float:
    """The median share of the time of the ``last`` iterations that went by before their batch was there."""
    histories = (trainer.storage.history(name).values()[-last:] for name in ("data_time", "time"))
    return statistics.median(data / whole for (data, _), (whole, _) in zip(*histories))
