"""Trains on the CPU, then on the pretended device, and prints how the two compare: a JSON object.

``python -m tests.gpu_without_gpu.train ENGINE CONFIG ANNOTATIONS IMAGES FOLDER``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.gpu_without_gpu import pretended
from zenith_det.benchmarking.loops import loaded_config
from zenith_det.engines.engine import load_engine
from zenith_det.engines.probe import iteration_of, make_trainer
from zenith_det.engines.trainer import Trainer

ITERATIONS, COUNTED_FROM, BATCH = 6, 2, 2
OTHER_BATCHES = (1, 4)
KEYS = [
    "SOLVER.BASE_LR", "0.001", "SOLVER.WARMUP_ITERS", "2", "SOLVER.ZENITH.WINDOW", "2", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


def train(words: list[str], device: str, batch: int = BATCH, iterations: int = ITERATIONS) -> Trainer:
    engine_name, config, annotations, images, folder = words
    engine = load_engine(engine_name)
    data = ["DATASETS.TRAIN_JSON", annotations, "DATASETS.TRAIN_IMAGES", images]
    loaded = loaded_config(config, KEYS, data, Path(folder) / device, batch, 64, torch.device(device))
    trainer = make_trainer(engine, loaded, fixed_batches=3)
    iterate = iteration_of(engine, trainer)
    pretended.WAITS.clear()
    for iteration in range(iterations):
        if iteration < COUNTED_FROM:
            iterate()
        else:
            with pretended.counting():
                iterate()
    return trainer


def main(words: list[str]) -> None:
    on_cpu = train(words, "cpu")
    pretended.install()
    on_device = train(words, "cuda")
    off = 0.0
    for p, q in zip(on_cpu.model.parameters(), on_device.model.parameters(), strict=True):
        assert q.is_cuda
        off = max(off, float((p.detach() - q.detach().cpu()).abs().max()))
    try:
        torch.ones(2, device="cuda") + torch.ones(2)
        mixed = "passes"
    except pretended.DevicesMixedError:
        mixed = "raises"
    counted = ITERATIONS - COUNTED_FROM
    found = {
        "off": off,
        "mixed": mixed,
        "loss": on_device.take_loss(),
        "waits": {BATCH: pretended.WAITS.total() / counted},
        "operations": pretended.OPERATIONS.total() / counted,
        "where": [f"{n / counted:g} {kind}: {line}" for (kind, line), n in pretended.WAITS.most_common()],
    }
    for batch in OTHER_BATCHES if words[0] == "torchvision" else ():
        train(words, "cuda", batch, COUNTED_FROM + 1)
        found["waits"][batch] = pretended.WAITS.total()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
